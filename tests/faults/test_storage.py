"""Disks that are full, read-only, forbidden, damaged, slow or gone: one clear error, and the last good state loads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.cli import main
from pipeline.config import CheckpointConfig
from pipeline.data import rowgroups
from pipeline.data.check import check_columns
from pipeline.data.logs import DESCRIPTION, Dataset
from pipeline.errors import CheckpointError, DataError
from pipeline.serve.program import save_program
from pipeline.train import checkpoint
from pipeline.train.checkpoint.shelf import Shelf, checkpoints
from pipeline.train.sharding import joined
from pipeline.train.trainer import Trainer
from tests.data.logs import rewrite
from tests.train.runs import parameters, tiny_config, train

STEPS = CheckpointConfig(steps=1, keep_newest=99)


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small disk in memory; skipped where this user may not mount."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        made = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if made.returncode:
        pytest.skip(f"a small disk cannot be made here: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def read_only(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)


@pytest.fixture(scope="module")
def whole(log: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An undisturbed run."""
    return train(tiny_config(checkpoint=STEPS), log, tmp_path_factory.mktemp("run"))


def loads(folder: Path) -> Path:
    """The newest good checkpoint of a folder, loaded."""
    with joined() as ranks:
        path, _ = Shelf(folder=folder, config=STEPS).newest_good(ranks)
    assert path is not None
    checkpoint.load_task(path)
    return path


# Checkpoints


def test_a_disk_that_fills_up_stops_the_run_and_the_last_checkpoint_loads(
    log: Path, whole: Any, tmp_path: Path
) -> None:
    size = sum(p.stat().st_size for p in whole["checkpoint"].iterdir())
    with mounted(tmp_path / "disk", f"size={int(1.5 * size) // 4096 * 4 + 16}k") as disk:
        with pytest.raises(CheckpointError, match=r"No space left on device; the last good one is .*step-00000001"):
            train(tiny_config(checkpoint=STEPS), log, disk)
        assert loads(disk).name == "epoch-0-step-00000001"
        assert not list(disk.glob(".*"))  # what was begun was taken away, so space is free again
        subprocess.run(["mount", "-o", f"remount,size={9 * size // 1024 + 64}k", str(disk)], check=True)
        resumed = train(tiny_config(checkpoint=STEPS), log, disk, resume=checkpoints(disk)[0])
        expected = parameters(whole["checkpoint"])
        for name, value in parameters(resumed["checkpoint"]).items():
            np.testing.assert_array_equal(value, expected[name], err_msg=name)


def test_a_disk_that_turns_read_only_stops_the_run_and_the_last_checkpoint_loads(log: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=64m") as disk:
        with joined() as ranks:
            trainer = Trainer(tiny_config(checkpoint=STEPS), Dataset.open(log), ranks, disk)
            trainer.position.step = 0
            trainer.save()
            trainer.writer.finish()
            read_only(disk)
            with pytest.raises(CheckpointError, match=r"Read-only file system: .*; the last good one is"):
                trainer.train()
        assert loads(disk).name == "epoch-0-step-00000000"


def test_a_folder_that_is_moved_away_is_made_anew(log: Path, tmp_path: Path) -> None:
    """What the run writes next is whole, and what was moved is too."""
    folder = tmp_path / "checkpoints"
    with joined() as ranks:
        trainer = Trainer(tiny_config(checkpoint=STEPS), Dataset.open(log), ranks, folder)
        trainer.save()
        trainer.writer.finish()
        shutil.move(folder, tmp_path / "elsewhere")
        trainer.train()
    assert loads(tmp_path / "elsewhere").name == "epoch-0-step-00000000"
    assert loads(folder).name == "epoch-1-step-00000000"


# Logs


def test_slow_reads_change_nothing_but_the_time(
    log: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = rowgroups.read_row_group

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.05)
        return real(*args, **kwargs)

    monkeypatch.setattr(rowgroups, "read_row_group", slow)
    found = train(tiny_config(checkpoint=STEPS), log, tmp_path)
    assert found["losses"] == whole["losses"]
    assert found["predictions"] == whole["predictions"]


def test_a_log_that_is_moved_away_in_mid_run_is_one_error(log: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(log, data)
    with joined() as ranks:
        trainer = Trainer(tiny_config(checkpoint=STEPS), Dataset.open(data), ranks, tmp_path / "run")
        shutil.move(data, tmp_path / "elsewhere")
        with pytest.raises(DataError, match="the file is gone; write the log anew or restore it"):
            trainer.train()
    with pytest.raises(DataError, match="there is no such data folder"):
        Dataset.open(data)


def test_every_flipped_bit_of_a_log_is_found(log: Path, tmp_path: Path) -> None:
    """A file is refused, or gives the very rows that were written; see also the fuzzing of `log_file`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = tmp_path / "data"
    shutil.copytree(log, root)
    dataset = Dataset.open(root)
    file = dataset.partitions("hf")[0].files[0]
    path = root / file.path
    sound = path.read_bytes()
    rows = pq.ParquetFile(path).read()
    rng, refused = np.random.default_rng(0), 0
    for place in rng.integers(0, len(sound), 150):
        damaged = bytearray(sound)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            with rowgroups.open_parquet(root, file.path) as opened:
                check_columns(opened.schema_arrow, dataset.schema, "hf", file=file.path)
                groups = enumerate(file.row_group_rows)
                parts = [rowgroups.read_row_group(opened, i, rows.column_names, n, path=file.path) for i, n in groups]
        except DataError:
            refused += 1
            continue
        assert pa.concat_tables(parts).equals(rows), f"bit of byte {place}"
    assert refused > 50


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied", "gone"])
def test_a_damaged_description_is_one_error(log: Path, tmp_path: Path, damage: str) -> None:
    root = tmp_path / "data"
    shutil.copytree(log, root)
    path = root / DESCRIPTION
    text = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        flipped = text.replace(b'"surfaces"', b'"surgaces"', 1)
        path.write_bytes({"truncated": text[:-10], "flipped": flipped, "emptied": b""}[damage])
    with pytest.raises(DataError, match=DESCRIPTION):
        Dataset.open(root)


def test_every_flipped_bit_of_a_description_is_found(log: Path, tmp_path: Path) -> None:
    """Digits too, which leave a valid description of another log."""
    root = tmp_path / "data"
    shutil.copytree(log, root)
    path, sound = root / DESCRIPTION, Dataset.open(root)
    text = path.read_bytes()
    digits = [i for i, byte in enumerate(text) if chr(byte).isdigit()]
    for place in [*digits[::7], *np.random.default_rng(0).integers(0, len(text), 500)]:
        damaged = bytearray(text)
        damaged[place] ^= 1 << (place % 3)
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=DESCRIPTION):
            Dataset.open(root)
    path.write_bytes(text)
    assert Dataset.open(root) == sound


def test_a_description_that_changed_is_not_gone_on_with(log: Path, tmp_path: Path) -> None:
    """An edit makes another log of it, and a run of the first one says so."""
    root, folder = tmp_path / "data", tmp_path / "run"
    shutil.copytree(log, root)
    path = train(tiny_config(checkpoint=STEPS), root, folder)["checkpoint"]
    rewrite(root, lambda d: d["partitions"][0]["numeric"]["hour"].update(sum=1.0))
    with pytest.raises(CheckpointError, match="data"):
        train(tiny_config(checkpoint=STEPS), root, folder, resume=path)


# Commands


@pytest.mark.parametrize("problem", ["No space left on device", "Read-only file system"])
def test_commands_say_what_the_disk_says(tmp_path: Path, capsys: pytest.CaptureFixture[str], problem: str) -> None:
    with mounted(tmp_path / "disk", "size=64k") as disk:
        if problem.startswith("Read"):
            read_only(disk)
        status = main(["simulate", "--out", str(disk / "log"), "--requests", "2000", "--days", "2"])
        said = capsys.readouterr().err
        assert status == 1
        assert problem in said
        assert said.startswith("trefoil simulate: ")
        assert len(said.splitlines()) == 1


def test_a_program_on_a_full_disk_is_an_error_of_the_disk(tmp_path: Path) -> None:
    """Torch's archives end the process where a write fails, so the disk's error waits until they are closed."""
    rows = torch.ones(2, 100)
    program = torch.export.export(torch.nn.Linear(100, 100), (rows,))
    with mounted(tmp_path / "disk", "size=16k") as disk:
        with pytest.raises(OSError, match="No space left on device"):
            save_program(program, disk / "model.pt2")
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        save_program(program, disk / "model.pt2")
        again = torch.export.load(disk / "model.pt2").module()
    torch.testing.assert_close(again(rows), program.module()(rows), rtol=0, atol=0)


# Root may read what is forbidden, unless it lacks this right.
WITHOUT_RIGHTS = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search")


# One process for all commands: each would import everything anew.
COMMANDS = """
import contextlib, io, json, sys
from pipeline.cli import main
for name, arguments in json.loads(sys.argv[1]).items():
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = main(arguments)
    print(json.dumps([name, status, said.getvalue()]))
"""


def test_permission_denied_is_one_error(log: Path, tmp_path: Path) -> None:
    if os.getuid() == 0 and not shutil.which(WITHOUT_RIGHTS[0]):
        pytest.skip("root may read everything, and there is no setpriv")
    root, shut, closed = tmp_path / "data", tmp_path / "shut", tmp_path / "closed"
    for copy in (root, closed):
        shutil.copytree(log, copy)
    file = next(root.rglob("*.parquet"))
    shut.mkdir()
    commands = {
        "log": ["inspect", str(closed)],
        "file": ["inspect", str(root)],
        "out": ["simulate", "--out", str(shut / "log")],
        "checkpoint": ["unshard", "--checkpoint", str(shut), "--out", str(tmp_path / "x.safetensors")],
        "artifact": ["score", "--artifact", str(shut), "--in", str(root), "--out", str(tmp_path / "x.parquet")],
    }
    for forbidden in (closed, file, shut):
        forbidden.chmod(0)
    prefix = WITHOUT_RIGHTS if os.getuid() == 0 else ()
    command = [*prefix, sys.executable, "-c", COMMANDS, json.dumps(commands)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for forbidden in (closed, file, shut):
        forbidden.chmod(0o755)
    assert done.returncode == 0, done.stderr
    found = {name: (status, said) for name, status, said in map(json.loads, done.stdout.splitlines())}
    assert found.keys() == commands.keys()
    for name, (status, said) in found.items():
        assert status == 1, name
        assert "Permission denied" in said, name
