"""One rank and two ranks train the same model; a resumed run ends where the uninterrupted one does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import CheckpointConfig
from pipeline.data.simulate import SimulationConfig, simulate
from pipeline.train.checkpoint import newest
from tests.distributed.ranks import run_ranks
from tests.train.runs import parameters, predictions, tiny_config, train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("log") / "data"
    simulate(root, SimulationConfig.tiny())
    return root


@pytest.fixture(scope="module")
def config() -> Any:
    return replace(tiny_config(), checkpoint=CheckpointConfig(steps=3, keep_newest=99))


@pytest.fixture(scope="module")
def two(data: Path, config: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The undisturbed run on two ranks."""
    folder = tmp_path_factory.mktemp("two")
    return folder, run_ranks(train, 2, config, data, folder)


@pytest.fixture(scope="module")
def one(data: Path, config: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The undisturbed run on one rank."""
    folder = tmp_path_factory.mktemp("one")
    return folder, train(config, data, folder)


def assert_same_parameters(a: Path, b: Path, *, exact: bool) -> None:
    first, second = parameters(a), parameters(b)
    assert first.keys() == second.keys()
    for name, value in first.items():
        if exact:
            np.testing.assert_array_equal(value, second[name], err_msg=name)
        else:
            np.testing.assert_allclose(value, second[name], rtol=2e-3, atol=2e-5, err_msg=name)


def test_two_ranks_have_the_loss_curve_of_one(one: Any, two: Any) -> None:
    assert len(one[1]["losses"]) > 5
    np.testing.assert_allclose(one[1]["losses"], two[1][0]["losses"], rtol=1e-4)


def test_two_ranks_end_with_the_parameters_and_predictions_of_one(one: Any, two: Any) -> None:
    assert_same_parameters(one[1]["checkpoint"], two[1][0]["checkpoint"], exact=False)
    alone, together = predictions([one[1]]), predictions(two[1])
    assert alone.keys() == together.keys()
    keys = sorted(alone)
    np.testing.assert_allclose([alone[k] for k in keys], [together[k] for k in keys], atol=1e-4)


def test_a_resumed_run_ends_with_the_very_same_parameters(data: Path, config: Any, one: Any, tmp_path: Path) -> None:
    middle = one[0] / "epoch-0-step-00000003"
    resumed = train(config, data, tmp_path, resume=middle)
    assert resumed["losses"] == one[1]["losses"][3:]
    assert_same_parameters(resumed["checkpoint"], one[1]["checkpoint"], exact=True)


def test_two_ranks_resume_what_one_wrote_and_the_other_way_round(
    data: Path, config: Any, one: Any, two: Any, tmp_path: Path
) -> None:
    up = run_ranks(train, 2, config, data, tmp_path / "up", one[0] / "epoch-0-step-00000003")
    np.testing.assert_allclose(up[0]["losses"], one[1]["losses"][3:], rtol=1e-4)
    assert_same_parameters(up[0]["checkpoint"], one[1]["checkpoint"], exact=False)
    down = train(config, data, tmp_path / "down", resume=two[0] / "epoch-0-step-00000003")
    np.testing.assert_allclose(down["losses"], two[1][0]["losses"][3:], rtol=1e-4)
    assert newest(tmp_path / "down") == down["checkpoint"]
