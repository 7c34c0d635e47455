"""From a checkpoint to registered models, and from the registry back to scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import polars as pl
import pyarrow.parquet as pq
from rich.console import Console

from pipeline.config import default_home
from pipeline.data.logs import Dataset
from pipeline.errors import RegistryError, unknown
from pipeline.progress import Bar, Progress, untold
from pipeline.rollout.registry import ALIASES, CHALLENGER, Registry, model_name
from pipeline.serve.artifact import CONFIG, ArtifactInfo, open_artifact
from pipeline.serve.bound import DEFAULT_BUDGET, Budget
from pipeline.serve.export import export, export_delta
from pipeline.serve.mlflow_model import log_artifact_model
from pipeline.serve.scorer import Scorer
from pipeline.tracking import Tracker, connect, tracking_uri
from pipeline.train.quiet import quiet_dependencies

REGISTRY_PREFIX = "models:/"


def export_surface(
    checkpoint: Path,
    surface: str,
    out: Path,
    *,
    dataset: Dataset | None,
    days: tuple[str, ...] | None = None,
    dtype: Literal["int8", "int4", "fp16", "fp32"] = "int8",
    max_requests: int | None = None,
    budget: Budget = DEFAULT_BUDGET,
    compile: bool = False,
    console: Console,
) -> dict[str, Any]:
    """Export one surface and say what came out; raises as `pipeline.serve.export.export`."""
    quiet_dependencies()
    with Bar(console, "steps") as bar:
        info = export(
            checkpoint,
            surface,
            out,
            dataset=dataset,
            days=days,
            dtype=dtype,
            max_requests=max_requests,
            budget=budget,
            compile=compile,
            progress=bar,
        )
    parity = info.read("parity.json")
    worst = max(task["largest_difference"] for task in parity["tasks"].values())
    console.print(
        f"exported {surface}: {info.bytes / 1e6:.1f} MB, tables {dtype}, "
        f"largest difference to the trainer {worst:.1e}, at most {info.signature.max_requests} requests a run ({out})"
    )
    return {"artifact": str(out), "surface": surface, "bytes": info.bytes, "digest": info.digest, "parity": parity}


def export_delta_of(
    checkpoint: Path, base: Path, out: Path, *, dataset: Dataset | None, console: Console
) -> dict[str, Any]:
    """Export what changed since an artifact and say how much; raises as `pipeline.serve.export.export_delta`."""
    quiet_dependencies()
    delta = export_delta(checkpoint, base, out, dataset=dataset)
    changed = sum(n for n, _ in delta.changed_rows.values())
    total = sum(n for _, n in delta.changed_rows.values())
    console.print(
        f"delta of {delta.surface}: {changed:,} of {total:,} table rows and the dense weights, "
        f"{delta.bytes / 1e6:.2f} MB against {delta.full_bytes / 1e6:.2f} MB ({out})"
    )
    return {"delta": str(out), **asdict(delta)}


def register_artifact(
    artifact: Path, *, experiment: str, folder: Path, parent: str | None, console: Console, challenger: bool = True
) -> dict[str, Any]:
    """Log an artifact to MLflow as a pyfunc model and register it as a version of its surface's model.

    Args:
        artifact: folder of the artifact.
        experiment: MLflow's experiment.
        folder: where the record of this run is kept until MLflow has it.
        parent: key of the training run's tracker, if there is one.
        console: where to say so.
        challenger: make it its surface's challenger; `trefoil rollout run` does so only after the gates.

    Raises:
        ArtifactError: the artifact is missing or damaged.
        RegistryError: MLflow cannot be reached or fails; nothing is registered.
    """
    info = open_artifact(artifact)
    made = info.read(CONFIG)
    trained = made["checkpoint"]
    # What leads from a model back to its run, its checkpoint and its data.
    origin = {
        "dataset": str(trained["dataset"]),
        "checkpoint": f"epoch-{trained['epoch']}-step-{trained['step']:08d}",
        "recipe": str(made["run"]["name"]),
        "seed": str(made["run"]["seed"]),
        **({"parent": parent} if parent is not None else {}),
    }
    tracker = Tracker.start(
        f"export-{info.surface}",
        run_dir=folder,
        root=default_home(),
        experiment=experiment,
        tags={"surface": info.surface, "digest": info.digest, "kind": "export", **origin},
        parent=parent,
        rank=0,
    )
    with tracker:
        tracker.log_metrics(_parity_metrics(info), step=0)
        uri = log_artifact_model(tracker, artifact)
    tags = {"digest": info.digest, **origin}
    version = Registry(default_home()).register(info.surface, uri, tags=tags, challenger=challenger)
    alias = CHALLENGER if challenger else None
    console.print(
        f"registered {model_name(info.surface)} version {version.version}" + (f" as {alias}" if alias else "")
    )
    return {"model": model_name(info.surface), "version": version.version, "alias": alias}


def _parity_metrics(info: ArtifactInfo) -> dict[str, float]:
    tasks = info.read("parity.json")["tasks"]
    return {
        f"parity/{info.surface}/{task}/{k}": float(v)
        for task, of in tasks.items()
        for k, v in of.items()
        if v is not None
    }


def open_scorer(artifact: str) -> Scorer:
    """The scorer of an artifact's folder, or of `models:/NAME@ALIAS` in the registry.

    Raises:
        ArtifactError: the artifact is missing or damaged.
        RegistryError: the registry has no such model or alias.
    """
    if not artifact.startswith(REGISTRY_PREFIX):
        return Scorer.open(artifact)
    name, at, alias = artifact.removeprefix(REGISTRY_PREFIX).partition("@")
    surface = name.removeprefix(model_name(""))
    if not at or not name.startswith(model_name("")):
        raise RegistryError(f"{artifact!r} is no model's address; write models:/{model_name('hf')}@{CHALLENGER}")
    if alias not in ALIASES:
        raise RegistryError(unknown("alias", alias, ALIASES))
    if Registry(default_home()).get(surface, alias) is None:
        raise RegistryError(
            f"no version of {name} is {alias}; make one with `trefoil export --register`, or point "
            "MLFLOW_TRACKING_URI or TREFOIL_HOME at the registry that has it"
        )
    import mlflow

    # By its place: MLflow finds a model by its name at an address that would be this process's from then on.
    client, uri = connect(default_home()), tracking_uri(default_home())
    version = client.get_model_version_by_alias(name, alias).version
    location = client.get_model_version_download_uri(name, version)
    place = mlflow.artifacts.download_artifacts(location, tracking_uri=uri, registry_uri=uri)
    scorer = mlflow.pyfunc.load_model(place).unwrap_python_model().scorer
    assert isinstance(scorer, Scorer), "models are logged by log_artifact_model"
    return scorer


def score_file(
    artifact: str,
    source: Path,
    out: Path,
    *,
    raw: bool = False,
    deltas: Sequence[Path] = (),
    progress: Progress = untold,
) -> int:
    """Score a Parquet file of rows into another, rows in the same order; returns their number.

    Args:
        artifact: see `open_scorer`.
        source: the rows.
        out: file to write.
        raw: feature columns hold raw values, not ids (`pipeline.serve.raw`).
        deltas: folders of deltas to apply first, in order.
        progress: told of the candidates that are scored.

    Raises:
        ArtifactError, RegistryError: see `open_scorer`; or a delta does not fit.
        DataError: the rows are not what the artifact wants.
    """
    quiet_dependencies()
    scorer = open_scorer(artifact)
    for delta in deltas:
        scorer.apply(delta)
    frame = scorer.score_frame(source, keys="raw" if raw else "ids", progress=progress)
    names = [c for c in ("request_id", "user_id") if c in pq.read_schema(source).names]
    keys = pl.read_parquet(source, columns=names, hive_partitioning=False) if names else pl.DataFrame()
    out.parent.mkdir(parents=True, exist_ok=True)
    keys.hstack(frame.rename({task: f"p_{task}" for task in scorer.signature.tasks})).write_parquet(out)
    return frame.height
