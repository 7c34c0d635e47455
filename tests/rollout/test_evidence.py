"""Gates' evidence read back from MLflow, and trainers' predictions made ready for slices."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from pipeline.data.flat import impressions
from pipeline.data.simulate import SimulationConfig, simulate
from pipeline.errors import DataError
from pipeline.evaluate.predictions import Predictions
from pipeline.rollout.evidence import EVIDENCE_FILE, gate_evidence
from pipeline.rollout.gates import DECISION, decide
from pipeline.rollout.measurements import MEASUREMENTS
from pipeline.rollout.quality import with_items
from pipeline.tracking import Tracker
from tests.rollout.plans import THRESHOLDS, good

TASKS = ("click", "save")


def record(root: Path, name: str, wave: int, surface: str, *, parity: float = 0.5, champion: int | None = 1) -> None:
    measured = good(surface, parity=parity)
    whole = {
        "champion": champion,
        "decision": DECISION.dump_python(decide(measured, THRESHOLDS, TASKS), mode="json"),
        "measurements": MEASUREMENTS.dump_python(measured, mode="json"),
    }
    tags = {"kind": "gates", "wave": str(wave), "surface": surface}
    with Tracker.start(name, run_dir=root / name, root=root, experiment="gates", tags=tags, rank=0) as tracker:
        tracker.log_text(json.dumps(whole), EVIDENCE_FILE)


def test_the_newest_decision_of_each_wave_and_surface(tmp_path: Path) -> None:
    record(tmp_path, "later", 1, "hf")
    record(tmp_path, "old", 0, "sr", parity=2.0)
    record(tmp_path, "hf", 0, "hf", champion=None)
    record(tmp_path, "new", 0, "sr")
    found = gate_evidence(tmp_path)
    assert [(e.wave, e.surface, e.run.name) for e in found] == [(0, "hf", "hf"), (0, "sr", "new"), (1, "hf", "later")]
    assert (found[0].champion, found[1].champion) == (None, 1)
    assert found[1].decision == decide(good("sr", parity=0.5), THRESHOLDS, TASKS)
    assert found[1].measured == good("sr", parity=0.5)
    assert [e.surface for e in gate_evidence(tmp_path, {"wave": "1"})] == ["hf"]


def test_a_run_without_evidence_is_named(tmp_path: Path) -> None:
    tags = {"kind": "gates", "wave": "0", "surface": "hf"}
    with Tracker.start("bare", run_dir=tmp_path / "bare", root=tmp_path, experiment="gates", tags=tags, rank=0):
        pass
    with pytest.raises(DataError, match=r"run bare has no artifact 'evidence\.json'"):
        gate_evidence(tmp_path)


def test_items_stand_beside_their_candidates(tmp_path: Path) -> None:
    dataset = simulate(tmp_path / "log", SimulationConfig.tiny())
    rows = impressions(dataset, surfaces=("sr",), tasks=("click",), days=dataset.days[-1:], item="item").collect()
    scored = rows.drop("item").with_columns(pl.lit(0.5).alias("p_click"), pl.lit(1.0).alias("weight"))
    found = with_items(Predictions.of(scored.sample(fraction=1.0, shuffle=True, seed=1)), dataset).table
    key = ["request_id", "candidate"]
    assert found.sort(key)["item"].to_list() == rows.sort(key)["item"].to_list()
