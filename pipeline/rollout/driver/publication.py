"""Evidence into MLflow, challengers into the registry, and the way back from a version to its files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from pipeline.config import default_home
from pipeline.errors import RegistryError
from pipeline.publish import register_artifact
from pipeline.rollout.audit import Evidence, Record
from pipeline.rollout.driver.context import Context
from pipeline.rollout.gates import DECISION
from pipeline.rollout.measurements import MEASUREMENTS
from pipeline.rollout.registry import Registry, Version, model_name
from pipeline.rollout.results import WaveResult
from pipeline.serve.artifact import MANIFEST, open_artifact
from pipeline.tracking import Tracker

EXPERIMENT = "trefoil/rollout"


def keep_evidence(context: Context, result: WaveResult, surface: str, *, parent: str | None) -> Evidence:
    """Write what a surface's decision rests on to the wave's folder and to an MLflow run of its own."""
    decision, measured = result.decisions[surface], result.measurements[surface]
    artifact = open_artifact(context.folder / result.artifacts[surface])
    whole = {
        "surface": surface,
        "artifact": artifact.digest,
        "dataset": result.dataset,
        "plan": result.plan,
        "wave": result.wave,
        "champion": result.champions[surface],
        "evaluation_days": result.evaluation_days,
        "code": result.code,
        "decision": DECISION.dump_python(decision, mode="json"),
        "measurements": MEASUREMENTS.dump_python(measured, mode="json"),
    }
    folder = context.folder / "evidence" / surface
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "evidence.json"
    path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    tracker = Tracker.start(
        f"gates-{surface}",
        run_dir=folder,
        root=default_home(),
        experiment=context.experiment,
        tags={
            "kind": "gates",
            "surface": surface,
            "wave": str(result.wave),
            "passed": str(decision.passed),
            "digest": artifact.digest,
            "dataset": result.dataset,
            "plan": result.plan,
        },
        parent=parent,
        rank=0,
    )
    with tracker:
        tracker.log_metrics({f"gate/{v.gate}/{v.subject or 'all'}": float(v.passed) for v in decision.verdicts}, step=0)
        tracker.log_artifact(path)
        tracker.flush()
    return Evidence(
        surface=surface,
        artifact=artifact.digest,
        dataset=result.dataset,
        plan=result.plan,
        wave=result.wave,
        champion=result.champions[surface],
        passed=decision.passed,
        run=tracker.run_id or tracker.key or "",
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
    )


def register_passed(context: Context, surface: str, artifact: Path, evidence: Evidence, *, parent: str | None) -> int:
    """Register an artifact that passed its gates and make it the challenger; returns its version."""
    made = register_artifact(
        artifact,
        experiment=context.experiment,
        folder=context.folder / "exports" / surface,
        parent=parent,
        console=context.console,
        challenger=False,
    )
    version = int(made["version"])
    Registry(default_home()).nominate(surface, version, evidence)
    context.console.print(f"  {model_name(surface)} version {version} is challenger")
    return version


def champion_artifact(surface: str, out: Path) -> Path:
    """The artifact's folder of the surface's champion."""
    version = Registry(default_home()).get(surface, "champion")
    if version is None:
        raise RegistryError(f"surface {surface!r} has no champion; promote one first")
    return artifact_of(version, out)


def artifact_of(version: Version, out: Path) -> Path:
    """The folder of a version's artifact: below `out` where a wave made it there, else MLflow's copy of it.

    Raises:
        RegistryError: neither is here, or the files are not those that were registered.
    """
    digest = version.tags.get("digest")
    for manifest in sorted(out.glob(f"wave-*/**/artifacts/*/{MANIFEST}")):
        if hashlib.sha256(manifest.read_bytes()).hexdigest() == digest:
            return open_artifact(manifest.parent).path
    name = f"version {version.version} of {model_name(version.surface)}"
    copies = sorted(Path(version.source).glob(f"artifacts/**/{MANIFEST}")) if version.source.startswith("/") else []
    if not copies:
        from mlflow.artifacts import download_artifacts

        target = out / "champions" / version.surface / str(version.version)
        target.mkdir(parents=True, exist_ok=True)
        copies = sorted(Path(download_artifacts(version.source, dst_path=str(target))).glob(f"**/{MANIFEST}"))
    if not copies:
        raise RegistryError(f"{name} has no artifact at {version.source}")
    info = open_artifact(copies[0].parent)
    if info.digest != digest:
        raise RegistryError(f"the files of {name} at {version.source} are not those that were registered")
    return info.path


def keep_change(record: Record) -> None:
    """A change of the registry as a run in MLflow."""
    folder = default_home() / "rollout-changes" / record.id
    tracker = Tracker.start(
        f"{record.action}-{record.surface}",
        run_dir=folder,
        root=default_home(),
        experiment=EXPERIMENT,
        tags={
            "kind": record.action,
            "surface": record.surface,
            "actor": record.actor,
            "outcome": record.outcome,
            "record": record.id,
        },
        params={
            "before": json.dumps(record.before),
            "after": json.dumps(record.after),
            "reason": record.reason,
            "evidence": record.evidence.run if record.evidence else "none",
        },
        rank=0,
    )
    with tracker:
        pass
