from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from pipeline.evaluate.baseline import TrivialBaseline
from pipeline.evaluate.compare import Comparison, compare
from pipeline.evaluate.predictions import Predictions
from pipeline.evaluate.report import as_dict, lineup, print_report
from tests.evaluate.rows import simulated, table


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    model = simulated(noise=0.5)
    trivial = TrivialBaseline().fit(model.table).judge(model)
    return compare(lineup(model, trivial=trivial, others={"before": simulated(noise=2.0)}), resamples=50)


def test_lineup_ends_with_the_oracle_where_truth_is_known(comparison: Comparison) -> None:
    assert list(comparison.scores) == ["model", "trivial", "before", "oracle"]
    assert list(lineup(Predictions.of(table()))) == ["model"]


def test_the_dict_holds_every_value_and_is_json(comparison: Comparison) -> None:
    said = json.loads(json.dumps(as_dict(comparison), allow_nan=False))
    auc = comparison.scores["oracle"]["sr"]["click"]["auc"]
    assert said["runs"]["oracle"]["sr"]["click"]["auc"] == [auc.value, auc.low, auc.high]
    assert said["differences"]["before"]["hf"]["click"]["ne"][1] > 0
    assert said["macro_auc"]["model"]["click"][0] == comparison.macro_auc["model"]["click"].value
    assert said["reference"] == "model"
    assert "reasons" not in said["runs"]["model"]["hf"]["click"]


def test_a_file_gets_whole_lines_without_colour(comparison: Comparison) -> None:
    out = io.StringIO()
    print_report(comparison, console=Console(file=out, width=40))
    text = out.getvalue()
    auc = comparison.scores["before"]["hf"]["click"]["auc"]
    assert f"{auc.value:.4f} [{auc.low:.4f}, {auc.high:.4f}]" in text
    gain = comparison.differences["oracle"]["sr"]["click"]["auc"]
    assert f"{gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]" in text
    assert "\x1b[" not in text


def test_a_terminal_sees_better_in_green_and_worse_in_red(comparison: Comparison) -> None:
    out = io.StringIO()
    print_report(comparison, console=Console(file=out, width=200, force_terminal=True, color_system="standard"))
    worse = comparison.differences["before"]["hf"]["click"]["ne"]
    better = comparison.differences["oracle"]["hf"]["click"]["ne"]
    assert worse.value is not None
    assert better.value is not None
    assert f"\x1b[31m{worse.value:+.4f}" in out.getvalue()
    assert f"\x1b[32m{better.value:+.4f}" in out.getvalue()


def test_reasons_stand_where_values_cannot() -> None:
    out = io.StringIO()
    found = compare({"model": Predictions.of(table(label_click=[0.0] * 4))}, resamples=5)
    print_report(found, console=Console(file=out))
    assert "all observed outcomes are negative" in out.getvalue()
    said = as_dict(found)["runs"]["model"]["hf"]["click"]
    assert said["auc"] == [None, None, None]
    assert said["reasons"]["auc"] == "all observed outcomes are negative"
