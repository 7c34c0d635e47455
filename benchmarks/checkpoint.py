"""What a checkpoint costs training: python -m benchmarks.checkpoint [--quick]

One rank trains; every few steps a checkpoint is begun in the middle of it. `stall_in_median_steps` is the whole cost of
a checkpoint: the time of all steps from the call to the end of the writing, beyond as many median steps without one,
so that cores and locks that the writing takes away count too. `call_in_median_steps` is the call alone. Medians over
checkpoints; the first, which makes the buffers, is given apart. On a busy machine the first figure is noisy; it says
nothing of a GPU, where the copy goes over the bus and the writing takes no core of the computation.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.common import Report
from pipeline.config import CheckpointConfig, RunConfig
from pipeline.data.logs import Dataset
from pipeline.data.simulate import SimulationConfig, simulate
from pipeline.recipes.demo import demo
from pipeline.train.sharding import joined
from pipeline.train.trainer import Position, Trainer


@dataclass(frozen=True, kw_only=True)
class Settings:
    requests: int = 24_000
    items: int = 200_000
    users: int = 20_000
    requests_per_batch: int = 256
    embedding_dim: int = 32
    checkpoints: int = 7
    """Checkpoints measured, after the first."""
    steps_between: int = 10


def quick() -> Settings:
    return Settings(requests=6_000, items=50_000, users=5_000, checkpoints=3, steps_between=6)


def config(settings: Settings, *, asynchronous: bool) -> RunConfig:
    recipe = demo()
    return replace(
        recipe,
        epochs=10_000,
        loader=replace(recipe.loader, requests_per_batch=settings.requests_per_batch),
        model=replace(recipe.model, embedding_dim=settings.embedding_dim),
        log_steps=1_000_000,
        checkpoint=CheckpointConfig(keep_newest=1, asynchronous=asynchronous),
    )


@dataclass
class Timed:
    """What one training with checkpoints took."""

    median_step_s: float
    first_call_s: float
    call_s: float
    stall_s: float
    writing_s: float
    megabytes: float


def measure(settings: Settings, dataset: Dataset, folder: Path, *, asynchronous: bool) -> Timed:
    """Train with a checkpoint every `steps_between` steps and tell what each cost."""
    with joined() as ranks:
        trainer = Trainer(config(settings, asynchronous=asynchronous), dataset, ranks, folder)
        trainer.model.train()
        steps: list[float] = []
        calls: list[float] = []
        stalls: list[float] = []
        writing: list[float] = []
        since = 0
        begun = 0.0
        window: list[float] = []
        stopwatch = time.perf_counter()
        done = 0
        while len(stalls) < settings.checkpoints + 1:
            for _ in trainer.steps(trainer.loader.batches(trainer.position.epoch)):
                now = time.perf_counter()
                trainer.position.step += 1
                done += 1
                # The first steps fill the pipeline and make the optimizer's state.
                if done > settings.steps_between:
                    if begun:
                        window.append(now - stopwatch)
                    else:
                        steps.append(now - stopwatch)
                if begun and not trainer.writer.writing:
                    writing.append(now - begun)
                    plain = statistics.median(steps)
                    stalls.append(calls[-1] + sum(window) - len(window) * plain)
                    begun, since, window = 0.0, 0, []
                since += 1
                if not begun and since > settings.steps_between and len(stalls) < settings.checkpoints + 1 and steps:
                    begun = time.perf_counter()
                    trainer.save()
                    calls.append(time.perf_counter() - begun)
                stopwatch = time.perf_counter()
                if len(stalls) > settings.checkpoints:
                    break
            trainer.position = Position(trainer.position.epoch + 1, 0)
        trainer.writer.finish()
        (last,) = [p for p in folder.iterdir() if not p.name.startswith(".")]
        size = sum(p.stat().st_size for p in last.iterdir()) / 1e6
    return Timed(
        median_step_s=statistics.median(steps),
        first_call_s=calls[0],
        call_s=statistics.median(calls[1:]),
        stall_s=statistics.median(stalls[1:]),
        writing_s=statistics.median(writing[1:]),
        megabytes=size,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less data and fewer checkpoints; under a minute")
    settings = quick() if parser.parse_args().quick else Settings()
    report = Report("checkpoint", settings)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "log"
        simulate(root, SimulationConfig(requests=settings.requests, items=settings.items, users=settings.users, days=3))
        dataset = Dataset.open(root)
        background = measure(settings, dataset, Path(scratch) / "background", asynchronous=True)
        waiting = measure(settings, dataset, Path(scratch) / "waiting", asynchronous=False)
    figures: dict[str, Any] = {
        "stall_in_median_steps": background.stall_s / background.median_step_s,
        "call_in_median_steps": background.call_s / background.median_step_s,
        "first_call_in_median_steps": background.first_call_s / background.median_step_s,
        "stall_in_median_steps_without_background": waiting.stall_s / waiting.median_step_s,
        "background": asdict(background),
        "waiting": asdict(waiting),
    }
    report.finish(figures)


if __name__ == "__main__":
    main()
