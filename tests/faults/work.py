"""What the campaign's processes do: train a tiny run, export it, promote it."""

from __future__ import annotations

import io
import json
import os
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from pipeline import job
from pipeline.config import CheckpointConfig, DaysConfig, HistoryConfig, LoaderConfig, RunConfig
from pipeline.data import rowgroups
from pipeline.data.logs import Dataset
from pipeline.job import membership
from pipeline.rollout.registry import Registry
from pipeline.serve.artifact import open_artifact
from pipeline.serve.export import export
from pipeline.serve.scorer import Scorer
from pipeline.train import checkpoint
from pipeline.train.checkpoint import files, shelf, writer
from pipeline.train.trainer import Trainer
from tests.data.logs import write_log
from tests.faults.attacks import Blow, Striker
from tests.rollout.models import TAGS, evidence, promote
from tests.train.runs import parameters, tiny_config

SIZES = {"hf": 60, "sr": 30, "rp": 12}
EPOCHS = 2
# A rank that makes no step for so long has hung. A busy machine may take its time for a step.
TIMEOUT_S = 10.0
# Ranks that wait for a stopped one before its first step give up this much later.
MARGIN_S = 3.0


def log(root: Path) -> Path:
    """The campaign's log."""
    write_log(root, SIZES)
    return root


def recipe() -> RunConfig:
    """Two passes of eleven steps, a checkpoint after every third, nothing held out."""
    tiny = tiny_config(checkpoint=CheckpointConfig(steps=3, keep_newest=3), epochs=EPOCHS, timeout_s=TIMEOUT_S)
    return replace(
        tiny,
        name="torture",
        days=DaysConfig(validation=0, test=0),
        loader=LoaderConfig(requests_per_batch=10, lanes=6, window=8, prefetch_batches=2),
        model=replace(
            tiny.model, history=HistoryConfig(kind="transformer", width=8, layers=1, heads=2), surface_gate=False
        ),
        log_steps=4,
    )


def train(rank: int, data: Path, folder: Path, attempt: Path, home: Path, blow: Blow | None) -> int:
    """One rank of one attempt: `trefoil train`'s own job, with blows and a record of what each step was trained on."""
    striker = Striker(blow if blow is not None and blow.victim == rank else None, attempt)
    striker.begin()
    os.environ["TREFOIL_HOME"] = str(home)
    membership.COLLECTIVE_MARGIN_S = MARGIN_S
    record = (attempt / f"steps-{rank}.jsonl").open("a", buffering=1)
    _plant(striker, record)
    console = Console(file=(attempt / "console.txt").open("a") if rank == 0 else io.StringIO(), width=200)
    result = job.run(recipe(), data, folder, console=console)
    return 0 if result.checkpoint is not None else 1


def _plant(striker: Striker, record: Any) -> None:
    """Events in the loader, between steps, and in the writing of checkpoints; each step's requests are written down."""
    rowgroups.read_row_group = striker.around("loader", rowgroups.read_row_group)
    for module, names in {
        writer: ("check", "write_durably", "write_manifest", "_replace", "sync_folder"),
        shelf: ("read_metrics",),
    }.items():
        for name in names:
            setattr(module, name, striker.around("checkpoint", getattr(module, name)))
    files._Hashed.write = striker.around("checkpoint", files._Hashed.write)  # type: ignore[method-assign]
    steps = Trainer.steps

    def recorded(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        for outputs in steps(self, *args, **kwargs):
            striker.event("step")
            requests = zip(
                outputs.batch.inputs.surface_of_request.tolist(), outputs.batch.request_id.tolist(), strict=True
            )
            place = {"epoch": self.position.epoch, "step": self.position.step}
            record.write(json.dumps(place | {"requests": [r for r in requests if r[1] >= 0]}) + "\n")
            yield outputs
            striker.event("step")

    Trainer.steps = recorded  # type: ignore[method-assign]


def unreadable(folder: Path) -> list[str]:
    """Checkpoints under their final names that are not whole."""
    problems = []
    for path in shelf.checkpoints(folder / "checkpoints"):
        try:
            checkpoint.read_state(path)
            checkpoint.verify(path)
        except Exception as error:  # noqa: BLE001  any way of being unreadable counts
            if not path.exists():
                continue  # ranks that outlived their launcher were told to leave, and pruned it meanwhile
            problems.append(f"{path.name}: {error}")
    return problems + [f"{p.name} was set aside" for p in (folder / "checkpoints").glob("*.damaged")]


def trained_on(attempts: list[tuple[Path, tuple[int, int]]]) -> tuple[int, int]:
    """Samples lost and repeated over all attempts.

    What counts of an attempt are its steps before the place that the next one went on from. An attempt that made no
    step counts for nothing, wherever it began.

    Args:
        attempts: their folders in order, and the (epoch, step) that each went on from.
    """
    effective: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for attempt, start in attempts:
        lines = [line for file in attempt.glob("steps-*.jsonl") for line in file.read_text().splitlines()]
        if lines:
            effective = {place: requests for place, requests in effective.items() if place < start}
        for entry in map(json.loads, lines):
            effective.setdefault((entry["epoch"], entry["step"]), []).extend(map(tuple, entry["requests"]))
    lost = repeated = 0
    expected = {(s, r) for s, size in enumerate(SIZES.values()) for r in range(size)}
    for epoch in range(EPOCHS):
        seen = Counter(r for (e, _), requests in effective.items() if e == epoch for r in requests)
        lost += len(expected - seen.keys())
        repeated += sum(n - 1 for n in seen.values())
    return lost, repeated


def weights(path: Path) -> dict[str, np.ndarray]:
    """Every parameter of a checkpoint."""
    return parameters(path)


def make_artifact(path: Path, data: Path, out: Path, attempt: Path, blow: Blow | None) -> float:
    """Export Home Feed; returns the seconds it took."""
    striker = Striker(blow, attempt)
    (attempt / "pids").write_text(f"{os.getppid()} {os.getpid()}")
    start = time.perf_counter()
    striker.begin()
    export(path, "hf", out, dataset=Dataset.open(data), dtype="fp32", max_requests=16)
    return time.perf_counter() - start


def scores(artifact: Path, data: Path) -> list[float]:
    """Probabilities of some rows, by a checked artifact."""
    info = open_artifact(artifact)
    dataset = Dataset.open(data)
    file = data / dataset.partitions("hf")[0].files[0].path
    return [v for row in Scorer.open(info).score(file)["click"].to_pylist() for v in row]


def prepare_surface(home: Path, surface: str, model_uri: str) -> None:
    """A surface with a champion, one before it, and a challenger with evidence."""
    registry = Registry(home)
    promote(registry, surface, model_uri)
    promote(registry, surface, model_uri)
    made = registry.register(surface, model_uri, tags=TAGS, challenger=False)
    registry.nominate(surface, made.version, evidence(surface, champion=2))


def promote_challenger(home: Path, surface: str, attempt: Path, blow: Blow | None) -> float:
    """The promotion; returns the seconds it took."""
    striker = Striker(blow, attempt)
    (attempt / "pids").write_text(f"{os.getppid()} {os.getpid()}")
    registry = Registry(home)
    registry.aliases(surface)
    start = time.perf_counter()
    striker.begin()
    registry.promote(surface, actor="the dead")
    return time.perf_counter() - start


def promotion_is_sound(home: Path, surface: str) -> str:
    """What is wrong after a promotion that may have been cut off, recovered; empty if nothing."""
    registry = Registry(home)
    now = registry.aliases(surface)
    if now.get("champion") not in (2, 3):
        return f"no champion, or a wrong one: {now}"
    registry.recover(surface)
    now = registry.aliases(surface)
    if now not in ({"champion": 3, "previous": 2}, {"champion": 2, "previous": 1, "challenger": 3}):
        return f"aliases are half moved: {now}"
    last = registry.history(surface)[-1]
    return "" if last.after == now else f"the last record says {last.after}, the aliases are {now}"
