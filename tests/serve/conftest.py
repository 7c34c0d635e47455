"""A tiny simulated log, a tiny trained model, and its artifacts: made once for all tests of serving."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

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
from pipeline.data.simulate import SimulationConfig, simulate
from pipeline.serve.artifact import ArtifactInfo
from pipeline.serve.export import export
from pipeline.serve.scorer import Scorer
from pipeline.train.sharding import joined
from pipeline.train.trainer import Trainer

CONFIG = RunConfig(
    name="tiny",
    surfaces=("hf", "sr", "rp"),
    tasks=("click", "save"),
    days=DaysConfig(validation=0, test=1),
    epochs=3,
    loader=LoaderConfig(requests_per_batch=32, lanes=4, window=32, history_length=10, prefetch_batches=0),
    model=ModelConfig(
        embedding_dim=8,
        history=HistoryConfig(kind="transformer", width=8, heads=2),
        projection=ProjectionConfig(width=8, rank=4),
        cross_layers=1,
        cross_rank=4,
        deep=(16,),
        mixture=MixtureConfig(experts=2, hidden=(8,)),
        tower_hidden=(8,),
    ),
    optimizer=OptimizerConfig(dense_lr=3e-3, sparse_lr=0.1),
)


@pytest.fixture(scope="session")
def log(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return simulate(tmp_path_factory.mktemp("log") / "log", SimulationConfig.tiny(history=16))


@pytest.fixture(scope="session")
def checkpoint(log: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(CONFIG, log, tmp_path_factory.mktemp("run"))


def train(config: RunConfig, log: Dataset, folder: Path) -> Path:
    """A trained checkpoint."""
    with joined() as ranks:
        return Trainer(config, log, ranks, folder).train()


@pytest.fixture(scope="session")
def artifact(
    log: Dataset, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], ArtifactInfo]:
    """Artifacts by surface and dtype, each exported once."""
    made: dict[tuple[str, str], ArtifactInfo] = {}
    folder = tmp_path_factory.mktemp("artifacts")

    def make(surface: str, dtype: str = "fp32") -> ArtifactInfo:
        if (surface, dtype) not in made:
            out = folder / f"{surface}-{dtype}"
            made[surface, dtype] = export(checkpoint, surface, out, dataset=log, dtype=dtype, max_requests=16)
        return made[surface, dtype]

    return make


@pytest.fixture(scope="session")
def scorer(artifact: Callable[[str, str], ArtifactInfo]) -> Scorer:
    """The fp32 scorer of Search, which has features of its own."""
    return Scorer.open(artifact("sr", "fp32"))


@pytest.fixture
def small_bound(scorer: Scorer) -> Scorer:
    """The same, with room for seven requests at a time."""
    return Scorer(replace(scorer.signature, max_requests=7), scorer.program)
