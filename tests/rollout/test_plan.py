"""The plan file: what is written is read back, and every wrong edit is one clear error."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.rollout.plan import plan_text, read_plan, write_plan
from tests.rollout.plans import plan


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "plan.yaml"
    write_plan(path, plan())
    assert read_plan(path) == plan()
    with pytest.raises(ConfigError, match="a reviewed plan is not written over"):
        write_plan(path, plan())


def test_people_may_write_days_without_quotes(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(plan_text(plan()).replace("'2026-01-12'", "2026-01-12"))
    assert read_plan(path).replay_days == ("2026-01-12",)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("- surfaces: [hf, sr]", "- surfaces: [hf, srr]", r"waves\[0\].surfaces: unknown surface 'srr'; did you mean"),
        ("- surfaces: [hf, sr, rp]", "- surfaces: [hf, rp]", r"waves\[1\].surfaces lacks sr of the wave before"),
        ("- surfaces: [hf, sr, rp]", "- surfaces: [hf, sr]", r"waves\[1\].surfaces adds none"),
        ("- surfaces: [hf, sr]", "- surfaces: [hf, hf]", "names a surface twice"),
        ("[merged, towers]", "[merged, tower]", "unknown step 'tower'; did you mean 'towers'"),
        ("[merged, towers]", "[towers]", "must begin with merged or carried"),
        ("[merged, towers]", "[carried, towers]", "there is no wave before it"),
        ("[merged, carried, warm_start]", "[merged, warm_start, towers]", "warm_start must stand last"),
        ("auc_margin", "auc_margn", "unknown field 'auc_margn'; did you mean 'auc_margin'"),
        ("  alpha: 0.05\n", "", "canary.alpha is missing"),
        ("looks: 10", "looks: many", "canary.looks: .*integer.* and is 'many'"),
        ("share: 0.5", "share: 5", r"canary.share is 5.0; it must lie in \(0, 1\]"),
        ("auc_margin: 0.01", "auc_margin: -0.01", "thresholds.auc_margin is -0.01"),
        ("cost_gain: 0.9", "cost_gain: 1.0", "thresholds.cost_gain is 1.0; it must lie between 0 and 1"),
        ("auc_margin: 0.01", "auc_margin: .nan", "thresholds.auc_margin is nan"),
        ("\n  calibration: [0.9, 1.1]", "\n  calibration: [1.1, 0.9]", r"thresholds.calibration is \[1.1, 0.9\]"),
        ("    rp: 90.0\n", "", "thresholds.p99_ms lacks surface 'rp'"),
        ("    rp: 90.0\n", "    rpp: 90.0\n", "thresholds.p99_ms: unknown surface 'rpp'; did you mean 'rp'"),
        ("replay_days: ['2026-01-12']", "replay_days: ['2026-01-11']", "the canary must see later days"),
        ("format_version: 1", "format_version: 2", "format_version: Input should be 1"),
        ("waves:", "waves: [", "is no YAML"),
    ],
)
def test_a_wrong_edit_is_one_clear_error(tmp_path: Path, old: str, new: str, problem: str) -> None:
    text = plan_text(plan())
    assert old in text
    path = tmp_path / "plan.yaml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError, match=problem) as caught:
        read_plan(path)
    assert str(path) in str(caught.value)


def test_files_that_are_no_plan(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trefoil rollout plan --out"):
        read_plan(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ConfigError, match="it must hold fields such as `waves`"):
        read_plan(tmp_path / "list.yaml")
    with pytest.raises(ConfigError, match="waves 1 to 2, and 0 for the separate models; not 3"):
        plan().wave(3)


def test_the_digest_names_what_decides() -> None:
    whole = plan()
    waves = (replace(whole.waves[0], why="another reason", predicted_ms={}), whole.waves[1])
    assert replace(whole, waves=waves, staging="x", measure="y").digest == whole.digest
    assert replace(whole, thresholds=replace(whole.thresholds, drift=0.3)).digest != whole.digest
    assert replace(whole, waves=(replace(whole.waves[0], steps=("merged",)), whole.waves[1])).digest != whole.digest
