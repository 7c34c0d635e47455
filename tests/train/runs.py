"""Small training runs for tests: a tiny simulated log, a tiny model with every block."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import (
    DaysConfig,
    HistoryConfig,
    LoaderConfig,
    MixtureConfig,
    ModelConfig,
    OptimizerConfig,
    ProjectionConfig,
    RunConfig,
)
from pipeline.data.logs import Dataset
from pipeline.train import checkpoint
from pipeline.train.judge import PredictionCollector
from pipeline.train.sharding import joined
from pipeline.train.trainer import Trainer


def tiny_config(**changes: Any) -> RunConfig:
    """A run of a few steps with every block switched on."""
    config = RunConfig(
        name="tiny",
        surfaces=("hf", "sr", "rp"),
        tasks=("click", "save"),
        days=DaysConfig(validation=0, test=1),
        loader=LoaderConfig(requests_per_batch=32, lanes=8, window=16, prefetch_batches=2),
        model=ModelConfig(
            embedding_dim=8,
            history=HistoryConfig(kind="transformer", width=8, layers=1, heads=2),
            projection=ProjectionConfig(width=8, rank=4),
            cross_layers=1,
            cross_rank=8,
            deep=(16,),
            surface_gate=True,
            mixture=MixtureConfig(experts=2, hidden=(8,)),
            tower_hidden=(8,),
        ),
        optimizer=OptimizerConfig(dense_lr=5e-3, sparse_lr=0.05, warmup_steps=2),
        log_steps=1,
    )
    return replace(config, **changes)


class Recorder:
    """Keeps every step's metrics."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def plan(self, trainer: Trainer) -> None:
        pass

    def progress(self, *, epoch: int, step: int, steps: int, metrics: dict[str, float]) -> None:
        self.steps.append({"epoch": epoch, "step": step, **metrics})

    def step(self, done: int, total: int, what: str) -> None:
        pass

    def losses(self) -> list[list[float]]:
        names = [n for n in self.steps[0] if n.endswith("loss")]
        return [[s[n] for n in names] for s in self.steps]


def train(config: RunConfig, data: Path, folder: Path, resume: Path | None = None) -> dict[str, Any]:
    """Train on this rank; what a test compares: losses by step, predictions of the test days, the checkpoint."""
    with joined() as ranks:
        recorder = Recorder()
        trainer = Trainer(config, Dataset.open(data), ranks, folder, recorder)
        if resume is not None:
            trainer.resume(resume)
        path = trainer.train()
        collector = PredictionCollector(config.surfaces, config.tasks)
        trainer.predict(trainer.days.test, collector.add)
        table = collector.table()
        return {
            "losses": recorder.losses() if recorder.steps else [],
            "checkpoint": path,
            "predictions": table.to_dicts() if table is not None else [],
        }


def predictions(results: list[dict[str, Any]]) -> dict[tuple[str, int, int], tuple[float, ...]]:
    """Probabilities by candidate, put together from all ranks."""
    return {
        (row["surface"], row["request_id"], row["candidate"]): tuple(v for n, v in row.items() if n[:2] == "p_")
        for result in results
        for row in result["predictions"]
    }


def parameters(path: Path) -> dict[str, np.ndarray]:
    """Every parameter of a checkpoint, unsharded."""
    return {name: value.detach().numpy() for name, value in checkpoint.load_task(path).state_dict().items()}
