"""What a run leaves behind: checkpoints, journals, the registry's records."""

from __future__ import annotations

import pickle
import random
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.faults.mutations import damage_bytes, damage_json
from tests.faults.targets.base import Target, WrongRow, task_and_plan


def _model() -> Any:
    import torch

    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Embedding(5, 2))


def checkpoint_index(folder: Path) -> Target:
    """DCP's index, a pickle: nothing it names is called, and tensors are loaded by it or refused."""
    import torch.distributed.checkpoint as dcp

    from pipeline.errors import CheckpointError
    from pipeline.train.checkpoint.files import HashedFiles, digest, write_manifest
    from pipeline.train.checkpoint.reading import load_overlap, load_unsharded
    from pipeline.train.checkpoint.shards import Reader, Writer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing is distributed
        writer = Writer(str(folder), HashedFiles())
        dcp.save({"model": _model().state_dict()}, storage_writer=writer, no_dist=True)
    seed, shards = (folder / ".metadata").read_bytes(), {p.name: digest(p) for p in folder.glob("rank-*")}

    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (folder / "ran",)

    def damage(data: bytes, rng: random.Random) -> bytes:
        if rng.random() < 0.05:
            return pickle.dumps(Bomb())
        return damage_bytes(data, rng)

    def run(data: bytes) -> None:
        path = folder / ".metadata"
        path.write_bytes(data)
        # As whoever forges an index would.
        write_manifest(folder, shards | {path.name: digest(path)})
        try:
            metadata = Reader(str(folder)).read_metadata()
        finally:
            if (folder / "ran").exists():
                raise WrongRow("the index ran code")
        for entry in metadata.storage_data.values():
            if "/" in entry.relative_path:
                raise WrongRow("the index names a file outside")
        with suppress(CheckpointError):
            load_unsharded(folder, _model())
        load_overlap(folder, {f"model.{name}": value for name, value in _model().state_dict().items()})

    return Target(name="checkpoint_index", seeds=(seed,), damage=damage, run=run, share=0.02)


def unsharded_checkpoint(folder: Path) -> Target:
    """A file of plain tensors, loaded into a model whole or not at all."""
    from safetensors.torch import save

    from pipeline.train.checkpoint.reading import load_unsharded

    folder.mkdir(parents=True)
    seed = save(_model().state_dict())

    def run(data: bytes) -> None:
        (folder / "model.safetensors").write_bytes(data)
        load_unsharded(folder / "model.safetensors", _model())

    return Target(name="unsharded_checkpoint", seeds=(seed,), damage=damage_bytes, run=run, share=0.02)


def checkpoint_state(folder: Path) -> Target:
    """A checkpoint's state.json; what is accepted names its own folder and describes a model."""
    from pipeline.train.checkpoint.state import CheckpointState, read_state, state_to_json

    folder.mkdir(parents=True)
    plan = task_and_plan()
    state = CheckpointState(
        format_version=3,
        config=plan.config,
        schema=plan.schema,
        moments=dict(plan.moments),
        dataset="0" * 16,
        training_days=("2026-01-01",),
        epoch=0,
        step=3,
        days_done={},
    )
    for name in (".metadata", "manifest.json"):
        (folder / name).write_bytes(b"{}")

    def run(data: bytes) -> None:
        (folder / "state.json").write_bytes(data)
        found = read_state(folder)
        if "/" in found.name or found.plan.config != found.config:
            raise WrongRow("the state names a folder elsewhere")

    return Target(name="checkpoint_state", seeds=(state_to_json(state),), damage=damage_json, run=run, share=0.04)


def checkpoint_manifest(folder: Path) -> Target:
    from pipeline.train.checkpoint.files import MANIFEST, digest, verify, write_manifest

    folder.mkdir(parents=True)
    for name in ("rank-0.safetensors", ".metadata", "state.json"):
        (folder / name).write_bytes(name.encode())
    write_manifest(folder, {p.name: digest(p) for p in folder.iterdir()})
    seed = (folder / MANIFEST).read_bytes()

    def run(data: bytes) -> None:
        (folder / MANIFEST).write_bytes(data)
        verify(folder)

    return Target(name="checkpoint_manifest", seeds=(seed,), damage=damage_json, run=run, share=0.08)


def journal_lines(folder: Path) -> Target:
    from pipeline.tracking.journal import JOURNAL, Journal, entries

    writer = Journal(folder)
    writer.append("run", key="k", name="n", experiment="e", parent=None, uri=None)
    writer.append("metrics", step=1, values={"a": 1.0})
    writer.append("finished", status="FINISHED")
    writer.close()
    seed = (folder / JOURNAL).read_bytes()

    def damage(data: bytes, rng: random.Random) -> bytes:
        lines = data.splitlines(keepends=True)
        at = rng.randrange(len(lines))
        lines[at] = damage_json(lines[at], rng) + (b"\n" if rng.random() < 0.9 else b"")
        return b"".join(lines)

    def run(data: bytes) -> None:
        (folder / JOURNAL).write_bytes(data)
        for entry, _ in entries(folder):
            if not isinstance(entry["kind"], str) or not isinstance(entry["ms"], int):
                raise WrongRow("an entry without kind and time was taken")

    return Target(name="journal_lines", seeds=(seed,), damage=damage, run=run, share=0.05)


def sent_state(folder: Path) -> Target:
    from pipeline.tracking.journal import STATE, State, read_state, write_state

    folder.mkdir(parents=True)
    write_state(folder, State(offset=120, run_id="abc"))

    def run(data: bytes) -> None:
        (folder / STATE).write_bytes(data)
        found = read_state(folder)
        if not isinstance(found.offset, int) or found.offset < 0:
            raise WrongRow("a state without an offset was taken")

    return Target(name="sent_state", seeds=((folder / STATE).read_bytes(),), damage=damage_json, run=run, share=0.03)


def registry_record(folder: Path) -> Target:
    """A change as it stands in the registry's tags."""
    from pipeline.rollout import audit
    from tests.rollout.models import evidence

    record = audit.begin(
        "promote", "hf", {"champion": 1}, {"champion": 2}, actor="a", evidence=evidence("hf"), reason="r"
    )

    def run(data: bytes) -> None:
        found = audit.load_record(data.decode("utf-8", "replace"), where="tag")
        assert found.age_s is not None
        assert audit.load_record(audit.dump(found), where="tag") == found

    seed = audit.dump(record).encode()
    return Target(name="registry_record", seeds=(seed,), damage=damage_json, run=run, share=0.05)
