"""Checkpoints: whole or refused, kept or removed as asked, never run as code, and plain when wanted."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline.config import CheckpointConfig, ModelConfig
from pipeline.data.logs import Dataset
from pipeline.errors import CheckpointError
from pipeline.train import checkpoint
from pipeline.train.checkpoint import shards
from pipeline.train.checkpoint.reading import flat, load_overlap, tensors_of
from pipeline.train.checkpoint.shards import Reader
from pipeline.train.checkpoint.shelf import Shelf, checkpoints
from pipeline.train.sharding import joined
from pipeline.train.trainer import Trainer
from tests.data.logs import rewrite
from tests.train.runs import parameters, tiny_config, train

STEPS = CheckpointConfig(steps=1, keep_newest=99)


def config(**changes: Any) -> Any:
    """A run with dropout, so that what is random within a step counts too."""
    tiny = tiny_config(checkpoint=STEPS)
    return replace(tiny, model=replace(tiny.model, dropout=0.1), **changes)


@pytest.fixture(scope="module")
def whole(log: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An uninterrupted run that wrote a checkpoint after every step."""
    folder = tmp_path_factory.mktemp("run")
    return folder, train(config(), log, folder)


@pytest.fixture
def folder(whole: Any, tmp_path: Path) -> Path:
    """A copy of the run's checkpoints, to damage."""
    shutil.copytree(whole[0], tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def test_killed_after_any_step_and_resumed_it_ends_with_the_same_bits(log: Path, whole: Any, tmp_path: Path) -> None:
    path = whole[0] / "epoch-0-step-00000001"
    resumed = train(config(), log, tmp_path, resume=path)
    assert resumed["losses"] == whole[1]["losses"][1:]
    assert resumed["predictions"] == whole[1]["predictions"]
    first, second = parameters(whole[1]["checkpoint"]), parameters(resumed["checkpoint"])
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


def test_what_is_written_in_the_background_is_what_was_there_when_asked(log: Path, whole: Any, tmp_path: Path) -> None:
    waiting = replace(config(), checkpoint=replace(STEPS, asynchronous=False))
    result = train(waiting, log, tmp_path)
    assert result["losses"] == whole[1]["losses"]
    for path in checkpoints(tmp_path):
        first, second = parameters(path), parameters(whole[0] / path.name)
        for name, value in first.items():
            np.testing.assert_array_equal(value, second[name], err_msg=f"{path.name} {name}")


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("rank-0.safetensors", flip_a_bit, "rank-0.safetensors has another checksum"),
        ("rank-0.safetensors", truncate, r"rank-0.safetensors has \d+ bytes in place of \d+"),
        ("rank-0.safetensors", Path.unlink, "rank-0.safetensors is missing"),
        (".metadata", flip_a_bit, ".metadata has another checksum"),
        ("state.json", truncate, "does not describe a checkpoint|state.json has"),
        ("manifest.json", truncate, "manifest.json is damaged"),
        ("manifest.json", Path.unlink, "manifest.json is missing"),
    ],
)
def test_damage_is_one_clear_error_and_the_one_before_is_gone_on_with(
    folder: Path, name: str, damage: Any, message: str
) -> None:
    newest, before = checkpoints(folder)[:2]
    damage(newest / name)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load_task(newest)
    with joined() as ranks:
        path, problems = Shelf(folder=folder, config=STEPS).newest_good(ranks)
    assert path == before
    assert len(problems) == 1
    assert newest.name in problems[0]
    assert not newest.exists()
    assert newest.with_name(newest.name + ".damaged").is_dir()


def test_when_no_checkpoint_is_whole_the_run_does_not_start_anew_by_itself(folder: Path) -> None:
    for path in checkpoints(folder):
        flip_a_bit(path / "rank-0.safetensors")
    with joined() as ranks, pytest.raises(CheckpointError, match=r"no checkpoint in .* can be gone on with"):
        Shelf(folder=folder, config=STEPS).newest_good(ranks)


def test_an_index_that_would_run_code_does_not(folder: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    path = checkpoints(folder)[0]
    (path / ".metadata").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match=r"it names posix\.system, which no index holds"):
        Reader(str(path)).read_metadata()
    with pytest.raises(CheckpointError):
        checkpoint.load_task(path)
    assert not (tmp_path / "ran").exists()


def test_an_index_cannot_name_files_outside_or_things_that_are_no_tensors(folder: Path) -> None:
    path = checkpoints(folder)[0]
    metadata = pickle.loads((path / ".metadata").read_bytes())  # noqa: S301  written by this test's run
    entry = next(iter(metadata.storage_data.values()))
    entry.relative_path = "../../secret"
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"'\.\./\.\./secret', which lies outside the checkpoint"):
        Reader(str(path)).read_metadata()


def test_an_index_that_points_past_a_tensor_is_damage(folder: Path) -> None:
    path = checkpoints(folder)[0]
    shutil.copy(path / ".metadata", folder.parent / "metadata")
    for wrong in ({"length": 4}, {"offset": -8}, {"offset": 1 << 40}):
        metadata = Reader(str(path)).read_metadata()
        for index, entry in metadata.storage_data.items():
            metadata.storage_data[index] = replace(entry, **wrong)
        (path / ".metadata").write_bytes(pickle.dumps(metadata))
        targets = {n: torch.zeros(tuple(m.size)) for n, m in metadata.state_dict_metadata.items() if m.size}
        with pytest.raises(CheckpointError, match=r"is damaged: it does not hold model\..* where \.metadata says"):
            load_overlap(path, targets)
        shutil.copy(folder.parent / "metadata", path / ".metadata")


def test_any_reader_of_safetensors_opens_its_tensors(whole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = whole[1]["checkpoint"]
    plain = load_file(path / "rank-0.safetensors")
    # Tables are read a block of rows at a time; here a few rows.
    monkeypatch.setattr(shards, "_BLOCK", 100)
    for name, value in parameters(path).items():
        np.testing.assert_array_equal(plain[f"model.{name}"].numpy(), value, err_msg=name)
    assert any(name.endswith("exp_avg_sq") for name in plain)


def planted(folder: Path, losses: list[float]) -> None:
    for step, loss in enumerate(losses):
        path = folder / f"epoch-0-step-{step:08d}"
        path.mkdir(parents=True)
        checkpoint.record_metrics(path, {"loss": loss})


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"keep_newest": 2}, [3, 4]),
        ({"keep_newest": 1, "best_metric": "loss"}, [3, 4]),
        ({"keep_newest": 1, "best_metric": "loss", "keep_best": 2}, [1, 3, 4]),
        ({"keep_newest": 1, "best_metric": "loss", "best_is": "highest"}, [2, 4]),
        ({"keep_newest": 1, "best_metric": "another"}, [4]),
        ({"keep_newest": 99}, [0, 1, 2, 3, 4]),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path: Path, settings: dict[str, Any], steps: list[int]) -> None:
    planted(tmp_path, [0.5, 0.1, 0.9, 0.1, 0.3])
    Shelf(folder=tmp_path, config=CheckpointConfig(**settings)).prune()
    assert sorted(int(p.name[-8:]) for p in tmp_path.iterdir()) == steps


def test_a_run_keeps_as_many_as_it_names(log: Path, tmp_path: Path) -> None:
    keep = CheckpointConfig(steps=1, keep_newest=1, best_metric="train/click/loss")
    result = train(replace(config(), checkpoint=keep), log, tmp_path)
    left = checkpoints(tmp_path)
    assert left[0] == result["checkpoint"]
    assert len(left) in (1, 2)
    assert all("train/click/loss" in checkpoint.read_metrics(p) for p in left)
    assert sorted(tmp_path.iterdir()) == sorted(left)


@contextmanager
def full_disk(free: int) -> Iterator[None]:
    """No file can grow past `free` bytes, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_one_clear_error_and_leaves_the_last_checkpoint(log: Path, folder: Path) -> None:
    last = checkpoints(folder)[1]
    shutil.rmtree(checkpoints(folder)[0])
    before = {p: p.read_bytes() for p in last.iterdir()}
    with joined() as ranks:
        trainer = Trainer(config(), Dataset.open(log), ranks, folder)
        trainer.resume(last)
        with full_disk(100_000), pytest.raises(CheckpointError, match=rf"could not be written: .*{last.name}"):
            trainer.train()
    assert {p: p.read_bytes() for p in last.iterdir()} == before
    assert checkpoints(folder)[0] == last
    assert not list(folder.glob(".*"))


def test_unsharded_it_is_plain_tensors_that_score_the_same(log: Path, whole: Any, tmp_path: Path) -> None:
    from pipeline.train.judge import score_days

    path = whole[1]["checkpoint"]
    file = checkpoint.unshard(path, tmp_path / "model.safetensors")
    plain, expected = load_file(file), parameters(path)
    assert plain.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(plain[name].numpy(), value, err_msg=name)
    assert json.loads(file.with_suffix(".json").read_text())["config"]["name"] == "tiny"
    days = Dataset.open(log).days[-1:]
    assert score_days(file, Dataset.open(log), days).table.equals(score_days(path, Dataset.open(log), days).table)
    with pytest.raises(CheckpointError, match="already exists"):
        checkpoint.unshard(path, file)
    truncate(file)
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load_task(file)


def resized(log: Path, root: Path, *, sizes: dict[str, int], method: str = "given") -> Path:
    """The same log, whose description gives vocabularies other sizes and methods."""
    shutil.copytree(log, root)

    def change(description: dict[str, Any]) -> None:
        for vocabulary in description["schema"]["vocabularies"]:
            if vocabulary["name"] in sizes:
                vocabulary |= {"size": sizes[vocabulary["name"]], "method": method}

    rewrite(root, change)
    return root


def start_warm(data: Path, path: Path, folder: Path, run: Any, **more: Any) -> tuple[dict[str, Any], list[Any]]:
    """Weights after a warm start, and its report."""
    with joined() as ranks:
        trainer = Trainer(run, Dataset.open(data), ranks, folder)
        report = checkpoint.warm_start(path, trainer.model, trainer.dataset.schema, **more)
        values = {n: whole_of(v) for n, v in trainer.model.state_dict().items()}
    return values, report


def whole_of(value: Any) -> torch.Tensor:
    """A tensor of a single rank, sharded or not."""
    if isinstance(value, torch.Tensor) and not hasattr(value, "local_shards"):
        return value.detach().clone()
    return torch.cat([s.tensor.detach() for s in value.local_shards()])


def test_a_warm_start_takes_what_fits_and_tells_of_every_table(log: Path, whole: Any, tmp_path: Path) -> None:
    path, old = whole[1]["checkpoint"], parameters(whole[1]["checkpoint"])
    data = resized(log, tmp_path / "data", sizes={"item": 55})
    run = replace(tiny_config(), exclude=("country",))
    values, report = start_warm(data, path, tmp_path / "run", run, fresh=("topic", "body.trunk.*", "body.mixture.*"))
    fates = {r.name: r.fate for r in report}
    assert {n: fates[n] for n in ("user", "item", "topic", "country", "query")} == {
        "user": "taken",
        "item": "grown",
        "topic": "new",
        "country": "left behind",
        "query": "taken",
    }
    item = values["model.embeddings.sequences.embeddings.item.weight"]
    assert item.shape == (55, 8)
    np.testing.assert_array_equal(item[:40], old["model.embeddings.sequences.embeddings.item.weight"])
    with joined() as ranks:
        first = Trainer(run, Dataset.open(data), ranks, tmp_path / "run").model.state_dict()
        np.testing.assert_array_equal(
            item[40:], whole_of(first["model.embeddings.sequences.embeddings.item.weight"])[40:]
        )
        topic = "model.embeddings.candidate_bags.embedding_bags.topic.weight"
        np.testing.assert_array_equal(values[topic], whole_of(first[topic]))
    kept = "model.body.towers.trees.surface_hf.heads.task_click.weight"
    np.testing.assert_array_equal(values[kept], old[kept])


@pytest.mark.parametrize(
    ("sizes", "method", "model", "message"),
    [
        ({}, "given", {"embedding_dim": 4}, r"table user: dimension 8 in the checkpoint, 4 here"),
        ({"item": 20}, "given", {}, "table item: 40 rows in the checkpoint, only 20 here"),
        ({"item": 50}, "hash", {}, "table item: its ids are of method 'given' in the checkpoint, 'hash' here"),
        ({}, "given", {"deep": (24,)}, r"body\.trunk\.deep.*: shape \[16"),
    ],
)
def test_a_warm_start_that_does_not_fit_is_refused(
    log: Path, whole: Any, tmp_path: Path, sizes: dict[str, int], method: str, model: dict[str, Any], message: str
) -> None:
    data = resized(log, tmp_path / "data", sizes=sizes, method=method)
    settings: ModelConfig = replace(tiny_config().model, **model)
    with pytest.raises(CheckpointError, match=message):
        start_warm(data, whole[1]["checkpoint"], tmp_path / "run", replace(tiny_config(), model=settings))
    with pytest.raises(CheckpointError, match="--fresh: unknown table or parameter 'itm'; did you mean 'item'"):
        start_warm(data, whole[1]["checkpoint"], tmp_path / "run", tiny_config(), fresh=("itm",))


def test_optimizer_state_is_part_of_it(log: Path, whole: Any, tmp_path: Path) -> None:
    with joined() as ranks:
        trainer = Trainer(config(), Dataset.open(log), ranks, tmp_path)
        trainer.resume(whole[1]["checkpoint"])
        state = flat(tensors_of(trainer.model, trainer.optimizer))
    momentum = [whole_of(v) for n, v in state.items() if n.endswith("momentum1")]
    assert len(momentum) == 5
    assert all(m.abs().sum() > 0 for m in momentum)
    assert sum(n.endswith("exp_avg_sq") for n in state) > 10
