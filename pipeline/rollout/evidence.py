"""What gates found, read back from MLflow: the evidence that every decision left there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.rollout.gates import DECISION, Decision
from pipeline.rollout.measurements import MEASUREMENTS, SurfaceMeasurements
from pipeline.tracking.runs import FoundRun, find_runs, read_artifact

EVIDENCE_FILE = "evidence.json"


@dataclass(frozen=True, kw_only=True)
class GateEvidence:
    """One decision on one surface, with what it rests on.

    Args:
        surface: that was judged.
        wave: number; 0 for the separate models.
        champion: version that it was compared with; None where nothing served, and the trivial baseline stood in.
        decision: with every gate's verdict.
        measured: what the gates looked at.
        run: MLflow's run that holds it.
    """

    surface: str
    wave: int
    champion: int | None
    decision: Decision
    measured: SurfaceMeasurements
    run: FoundRun


def gate_evidence(root: str | os.PathLike[str], tags: Mapping[str, str] | None = None) -> list[GateEvidence]:
    """The newest decision on each surface in each wave, in order of wave and time.

    Args:
        root: folder of the embedded store, where `MLFLOW_TRACKING_URI` names no server.
        tags: that the runs must bear too, such as dataset, wave or surface.

    Raises:
        DataError: there is no store, or a run lacks its evidence.
    """
    found: dict[tuple[int, str], GateEvidence] = {}
    for run in find_runs(root, {"kind": "gates", **(tags or {})}):
        place = int(run.tags["wave"]), run.tags["surface"]
        if place in found:
            continue
        whole = json.loads(read_artifact(root, run, EVIDENCE_FILE))
        found[place] = GateEvidence(
            surface=place[1],
            wave=place[0],
            champion=whole["champion"],
            decision=DECISION.validate_python(whole["decision"]),
            measured=MEASUREMENTS.validate_python(whole["measurements"]),
            run=run,
        )
    return sorted(found.values(), key=lambda e: (e.wave, e.run.started_ms))
