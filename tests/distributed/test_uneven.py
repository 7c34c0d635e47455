"""A rank that gets no request in a step trains on with the others, and changes nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import RunConfig
from pipeline.data.layout import feature_layout
from pipeline.data.loader import Loader
from pipeline.data.logs import Dataset
from pipeline.data.simulate import SimulationConfig, simulate
from tests.data.logs import rewrite
from tests.distributed.ranks import run_ranks
from tests.train.runs import predictions, tiny_config, train

RANKS = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("log") / "data"
    simulate(root, SimulationConfig.tiny(requests=60))
    return root


def config() -> RunConfig:
    tiny = tiny_config()
    return replace(tiny, loader=replace(tiny.loader, requests_per_batch=4, lanes=8, window=4))


def requests_of_ranks(data: Path) -> np.ndarray:
    """Real requests by rank and step of the training days."""
    dataset, run = Dataset.open(data), config()
    layout = feature_layout(dataset.schema, surfaces=run.surfaces, tasks=run.tasks)
    found = []
    for rank in range(RANKS):
        loader = Loader(dataset, layout, run.loader, days=dataset.days[:-1], seed=run.seed, rank=rank, world_size=RANKS)
        found.append([int((b.request_id >= 0).sum()) for b in loader.batches(0)])
    return np.array(found)


def test_a_missing_file_and_tiny_ones_hang_no_rank(data: Path, tmp_path: Path) -> None:
    """Two ranks; one surface has no file on all training days but the first."""
    of = json.loads((data / "dataset.json").read_text())
    training = sorted({p["date"] for p in of["partitions"]})[:-1]
    kept = [p for p in of["partitions"] if not (p["surface"] == "rp" and p["date"] in training[1:])]
    assert len(kept) < len(of["partitions"])
    shutil.copytree(data, tmp_path / "data")
    rewrite(tmp_path / "data", lambda d: d.update(partitions=kept))
    two: list[dict[str, Any]] = run_ranks(train, 2, config(), tmp_path / "data", tmp_path / "two")
    one = train(config(), tmp_path / "data", tmp_path / "one")
    assert len(two[0]["losses"]) == len(one["losses"]) > 0
    np.testing.assert_allclose(two[0]["losses"], one["losses"], rtol=1e-3)


def test_ranks_without_requests_train_like_one_rank(data: Path, tmp_path: Path) -> None:
    counts = requests_of_ranks(data)
    assert (counts == 0).any(), "the log must leave a rank without a request in some step"
    assert (counts.sum(0) > 0).all()
    many: list[dict[str, Any]] = run_ranks(train, RANKS, config(), data, tmp_path / "many")
    one = train(config(), data, tmp_path / "one")
    assert len(one["losses"]) == counts.shape[1]
    np.testing.assert_allclose(many[0]["losses"], one["losses"], rtol=1e-3)
    together, alone = predictions(many), predictions([one])
    assert together.keys() == alone.keys()
    assert all(request_id >= 0 for _, request_id, _ in together)
    np.testing.assert_allclose([together[k] for k in sorted(alone)], [alone[k] for k in sorted(alone)], atol=1e-3)
