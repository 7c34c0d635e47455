"""Day after day: the order of days, what is not as it should be, and what a run makes of them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from pipeline.config import CheckpointConfig, DaysConfig
from pipeline.daily import DailyResult, run_days
from pipeline.data.logs import DESCRIPTION, Dataset
from pipeline.data.writer import LogWriter
from pipeline.errors import CheckpointError, ConfigError, DataError
from pipeline.train import checkpoint
from pipeline.train.days import DayChoices, day_digest, days_to_come
from pipeline.train.judge import score_days
from tests.data.logs import SURFACES, request, schema, table
from tests.train.runs import parameters, tiny_config

FIRST = date(2026, 1, 1)


def day(number: int) -> str:
    return (FIRST + timedelta(days=number - 1)).isoformat()


def write(root: Path, days: dict[int, int], *, items: int = 40, method: str = "given") -> Path:
    """A log of the given days; the number behind each is the seed of its content, so that other days do not matter."""
    shutil.rmtree(root, ignore_errors=True)
    of = schema()
    sized = tuple(replace(v, size=items, method=method) if v.name == "item" else v for v in of.vocabularies)
    of = replace(of, vocabularies=sized)
    writer = LogWriter(root, of, row_group_requests=7)
    for number, seed in days.items():
        rng = np.random.default_rng([number, seed])
        for surface in SURFACES:
            rows = [request(rng, surface, 1000 * number + n, of) for n in range(24)]
            writer.write(surface, day(number), table(rows, surface, of))
    writer.close({})
    return root


def come(root: Path, done: dict[str, str], **choices: Any) -> tuple[str, ...]:
    return days_to_come(Dataset.open(root), DaysConfig(), done, DayChoices(**choices))


@pytest.fixture(scope="module")
def gappy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("log") / "data", {1: 0, 2: 0, 4: 0, 5: 0})


def digests(root: Path, *numbers: int) -> dict[str, str]:
    return {day(n): day_digest(Dataset.open(root), day(n)) for n in numbers}


def test_days_come_in_order_and_only_once(gappy: Path) -> None:
    assert come(gappy, {}, skip=(day(3),)) == (day(1), day(2), day(4), day(5))
    assert come(gappy, digests(gappy, 1, 2), skip=(day(3),)) == (day(4), day(5))
    assert come(gappy, digests(gappy, 1, 2, 4, 5)) == ()


@pytest.mark.parametrize(
    ("done", "choices", "message"),
    [
        ((), {}, "2026-01-03 is missing: write it, or --skip 2026-01-03"),
        ((1, 2), {}, "2026-01-03 is missing"),
        ((1, 4), {}, "2026-01-02 came after 2026-01-04 was trained on: --late or --skip 2026-01-02"),
        ((1, 2), {"skip": ("2026-01-03",), "late": ("2026-01-04",)}, "--late 2026-01-04: it is not late"),
        ((1, 2, 4), {"again": ("2026-01-02",)}, "--again 2026-01-02: it has not changed"),
    ],
)
def test_a_day_that_is_not_as_it_should_be_is_named(
    gappy: Path, done: tuple[int, ...], choices: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        come(gappy, digests(gappy, *done), **choices)


def test_late_and_changed_days_are_trained_on_when_named(gappy: Path) -> None:
    assert come(gappy, digests(gappy, 1, 4), late=(day(2),)) == (day(2), day(5))
    assert come(gappy, digests(gappy, 1, 4), skip=(day(2),)) == (day(5),)
    changed = digests(gappy, 1, 2, 4) | {day(2): "other"}
    with pytest.raises(DataError, match="2026-01-02 has changed since it was trained on: --again or --keep 2026-01-02"):
        come(gappy, changed)
    assert come(gappy, changed, again=(day(2),)) == (day(2), day(5))
    assert come(gappy, changed, keep=(day(2),)) == (day(5),)


def config(**changes: Any) -> Any:
    tiny = tiny_config(checkpoint=CheckpointConfig(steps=2, keep_newest=99), bootstrap_resamples=5, **changes)
    return replace(tiny, optimizer=replace(tiny.optimizer, decay="none"))


def follow(root: Path, folder: Path, choices: DayChoices | None = None, **changes: Any) -> DailyResult:
    return run_days(config(**changes), root, folder, console=Console(quiet=True), choices=choices or DayChoices())


def same(a: Path | None, b: Path | None) -> None:
    assert a is not None
    assert b is not None
    first, second = parameters(a), parameters(b)
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREFOIL_HOME", str(tmp_path / "home"))


def test_day_by_day_is_all_at_once_and_each_day_is_scored_before_it_is_seen(tmp_path: Path) -> None:
    root = write(tmp_path / "data", {1: 0, 2: 0, 3: 0})
    at_once = follow(root, tmp_path / "once")
    assert at_once.days == (day(1), day(2), day(3))
    assert list(at_once.scores) == [day(2), day(3)]
    steps = tmp_path / "steps"
    for number in (1, 2, 3):
        last = follow(write(root, dict.fromkeys(range(1, number + 1), 0)), steps)
        assert last.days == (day(number),)
    same(at_once.checkpoint, last.checkpoint)
    assert follow(root, steps).days == ()
    # The predictions for day 2 are those of the checkpoint that had seen day 1 alone.
    before = steps / "checkpoints" / "epoch-1-step-00000000"
    assert checkpoint.read_state(before).days_done.keys() == {day(1)}
    predicted = pl.read_parquet(steps / "predictions" / f"next-{day(2)}.parquet")
    expected = score_days(before, Dataset.open(root), (day(2),)).table
    np.testing.assert_allclose(predicted["p_click"], expected["p_click"], atol=1e-6)
    metrics = checkpoint.read_metrics(before)
    reported = json.loads((steps / f"next-{day(2)}_metrics.json").read_text())
    assert reported["days"] == [day(2)]
    assert {n.split("/")[1] for n in metrics if n.startswith("next/")} == {*SURFACES, "macro"}


def test_cut_off_within_a_day_it_goes_on_within_that_day(tmp_path: Path) -> None:
    root = write(tmp_path / "data", {1: 0, 2: 0})
    whole = follow(root, tmp_path / "whole")
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    shutil.rmtree(cut / "checkpoints" / "epoch-2-step-00000000")
    left = checkpoint.newest(cut / "checkpoints")
    assert left is not None
    assert left.name == "epoch-1-step-00000002"
    again = follow(root, cut)
    assert again.days == (day(2),)
    same(whole.checkpoint, again.checkpoint)
    shutil.rmtree(cut / "checkpoints" / "epoch-2-step-00000000")
    with pytest.raises(CheckpointError, match="dataset differ"):
        follow(write(root, {1: 0, 2: 1}), cut)


def test_a_table_grows_and_keeps_what_it_knows(tmp_path: Path) -> None:
    root, folder = write(tmp_path / "data", {1: 0}), tmp_path / "run"
    small = follow(root, folder).checkpoint
    assert small is not None
    old = parameters(small)
    write(root, {1: 0, 2: 0}, items=60)
    # Every row is as large and as many as before; only the vocabulary says more.
    description = json.loads((root / DESCRIPTION).read_text())
    assert {v["name"]: v["size"] for v in description["schema"]["vocabularies"]}["item"] == 60
    grown = follow(root, folder, DayChoices()).checkpoint
    assert grown is not None
    new = parameters(grown)
    name = "model.embeddings.sequences.embeddings.item.weight"
    assert (old[name].shape[0], new[name].shape[0]) == (40, 60)
    unseen = (new[name][:40] == old[name]).all(axis=1)
    assert not unseen.all(), "day 2 has trained some rows"
    write(root, {1: 0, 2: 0, 3: 0}, items=40)
    with pytest.raises(CheckpointError, match="vocabulary 'item' has shrunk from 60 to 40 ids"):
        follow(root, folder)


def test_a_decaying_rate_is_refused(tmp_path: Path) -> None:
    root = write(tmp_path / "data", {1: 0})
    with pytest.raises(ConfigError, match=r"optimizer\.decay is 'linear'"):
        run_days(tiny_config(), root, tmp_path / "run", console=Console(quiet=True), choices=DayChoices())
