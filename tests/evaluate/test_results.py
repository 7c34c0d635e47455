"""Predictions of recorded runs by arm and seed."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import ConfigError, DataError
from pipeline.evaluate.predictions import write_predictions
from pipeline.evaluate.results import parse_arms, predictions_of, runs_of
from pipeline.tracking import Tracker
from tests.evaluate.rows import simulated


def record(root: Path, recipe: str, seed: int, surfaces: tuple[str, ...], *, dataset: str = "d1", **tags: str) -> None:
    folder = root / f"{recipe}-{seed}{''.join(tags)}"
    rows = simulated(seed=seed, noise=0.5).select(surfaces=surfaces)
    write_predictions(folder / "predictions" / "test.parquet", rows)
    tags |= {"recipe": recipe, "seed": str(seed), "dataset": dataset, "run_dir": str(folder)}
    with Tracker.start(folder.name, run_dir=folder, root=root, experiment=recipe, tags=tags, rank=0):
        pass


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("home")
    for seed in (0, 1):
        record(root, "all", seed, ("hf", "sr"))
        record(root, "only_hf", seed, ("hf",))
    record(root, "only_sr", 1, ("sr",))
    record(root, "elsewhere", 0, ("hf",), dataset="d2")
    record(root, "all", 2, ("hf",), sweep="rates")
    record(root, "all", 1, ("hf",), kind="export")
    return root


def test_an_arm_of_single_surfaces_counts_where_each_has_a_run(root: Path) -> None:
    runs = runs_of(root, {"separate": ("only_hf", "only_sr"), "unified": ("all",)})
    assert {arm: list(seeds) for arm, seeds in runs.items()} == {"separate": [1], "unified": [0, 1]}
    predictions = predictions_of(runs)
    assert [len(of) for of in predictions.values()] == [1, 2]
    whole = simulated(seed=1, noise=0.5)
    (separate,) = predictions["separate"]
    assert len(separate) == len(whole)
    for surface in ("hf", "sr"):
        want = whole.rows(surface, "click").p
        assert (separate.rows(surface, "click").p == want).all()
        assert (predictions["unified"][1].rows(surface, "click").p == want).all()


def test_what_is_missing_is_named(root: Path) -> None:
    with pytest.raises(DataError, match=r"merged: no finished run of it; unknown recipe 'al'; did you mean 'all'"):
        runs_of(root, {"merged": ("al",)})
    with pytest.raises(DataError, match="no finished run of recipe 'elsewhere' is on the log d1"):
        runs_of(root, {"unified": ("all",), "other": ("elsewhere",)})
    record(root, "elsewhere", 3, ("hf",))
    with pytest.raises(DataError, match="the runs of only_sr, elsewhere have no seed in common"):
        runs_of(root, {"separate": ("only_sr", "elsewhere")})


@pytest.mark.parametrize("text", ["demo", "=demo", "a=", "a=b+", "a=b a=c", ""])
def test_arms_that_name_nothing_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="write NAME=RECIPE"):
        parse_arms(text)
