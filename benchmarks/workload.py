"""What the training benchmarks train: one model, simulated logs of fixed shape, ready batches, one step.

The model is the demo's unified one at the widths of a model for long histories: two Transformer layers of width 64,
tables of dimension 32, four experts, per-surface towers, three surfaces, four tasks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

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
from pipeline.data.batch import Batch
from pipeline.data.logs import Dataset
from pipeline.data.simulate import SimulationConfig, simulate
from pipeline.errors import DataError
from pipeline.train.sharding import joined
from pipeline.train.trainer import Trainer

DAYS, WARMUP_DAYS = 2, 30
LEAST_USERS, VISITS_PER_EVENT = 8, 2


def log(root: Path, *, requests: int, candidates: int, history: int, **knobs: Any) -> Dataset:
    """A simulated log of three surfaces whose requests all have `candidates` and, nearly all, `history` events.

    Args:
        root: where it is written.
        requests: of the training day, at the least; as many again for the day that every run keeps for its test.
        candidates: of every request.
        history: most events of a request.
        knobs: further fields of `SimulationConfig`.
    """
    # So few users that each has filled its history before the first day.
    requests = max(requests, LEAST_USERS * VISITS_PER_EVENT * history // WARMUP_DAYS)
    settings: dict[str, Any] = {
        "requests": DAYS * requests,
        "days": DAYS,
        "users": requests * WARMUP_DAYS // (VISITS_PER_EVENT * history),
        "items": 20_000,
        "candidates": candidates,
        "history": history,
        "candidate_spread": 0,
        "warmup_days": WARMUP_DAYS,
    }
    made = simulate(root, SimulationConfig(**settings | knobs))
    events = [
        len(h)
        for f in made.root.glob("surface=*/date=*/*.parquet")
        for h in pq.read_table(f)["history_item"].to_pylist()
    ]
    if sum(events) < 0.9 * history * len(events):
        raise DataError(f"histories hold {sum(events) / len(events):.0f} events of {history}", file=str(root))
    return made


def config(*, requests_per_batch: int = 128, **changes: Any) -> RunConfig:
    """The run that is measured; `changes` replace fields of `RunConfig`."""
    run = RunConfig(
        name="benchmark",
        surfaces=("hf", "sr", "rp"),
        tasks=("click", "long_click", "save", "hide"),
        days=DaysConfig(validation=0, test=1),
        loader=LoaderConfig(requests_per_batch=requests_per_batch),
        model=ModelConfig(
            embedding_dim=32,
            history=HistoryConfig(kind="transformer", width=64, layers=2, heads=2),
            projection=ProjectionConfig(width=32, rank=32),
            cross_layers=2,
            cross_rank=64,
            deep=(256, 128),
            mixture=MixtureConfig(experts=4, hidden=(64,)),
            tower_hidden=(64,),
        ),
        optimizer=OptimizerConfig(decay="none"),
    )
    return replace(run, **changes)


@contextmanager
def trainer(run: RunConfig, dataset: Dataset, folder: Path) -> Iterator[Trainer]:
    """A trainer alone on one thread."""
    torch.set_num_threads(1)
    with joined() as ranks:
        made = Trainer(run, dataset, ranks, folder)
        made.model.train()
        yield made


def repeated(trainer: Trainer, batches: int) -> Iterator[Batch]:
    """The first batches of an epoch again and again, made ahead of time."""
    return cycle(list(islice(trainer.loader.batches(0), batches)))
