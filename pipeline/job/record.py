"""What MLflow knows of a run before its first step: tags, parameters, data set, recipe, environment."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

from pipeline.config import RunConfig, config_to_json, default_home, flat_config
from pipeline.data.logs import Dataset
from pipeline.tracking import Tracker
from pipeline.train.environment import environment
from pipeline.train.sharding import Ranks


def experiment_of(config: RunConfig) -> str:
    """MLflow's experiment of a recipe's runs."""
    return f"trefoil/{config.name}"


def start_tracker(
    config: RunConfig,
    dataset: Dataset,
    folder: Path,
    ranks: Ranks,
    *,
    tags: Mapping[str, str] | None = None,
    parent: str | None = None,
) -> Tracker:
    """The record of a run, with further tags and a parent if given; only the first rank's goes anywhere."""
    tracker = Tracker.start(
        folder.name,
        run_dir=folder,
        root=default_home(),
        experiment=experiment_of(config),
        tags={**(tags or {}), **_tags(config, dataset, ranks), "run_dir": str(folder.absolute())},
        params=flat_config(config),
        parent=parent,
        rank=ranks.rank,
    )
    root = dataset.root.absolute()
    tracker.log_dataset(root.name, digest=dataset.fingerprint, source=str(root), context="training")
    # Parameters are cut where they are long; this is the recipe to train again with.
    tracker.log_text(config_to_json(config).decode(), "config.json")
    if ranks.is_first:
        tracker.log_text(json.dumps(environment(ranks.device), indent=1), "environment.json")
    return tracker


def _tags(config: RunConfig, dataset: Dataset, ranks: Ranks) -> dict[str, str]:
    code = code_version()
    return {
        "recipe": config.name,
        "seed": str(config.seed),
        "surfaces": ",".join(config.surfaces),
        "surface": config.surfaces[0] if len(config.surfaces) == 1 else "several",
        "dataset": dataset.fingerprint,
        "data": str(dataset.root.absolute()),
        "world_size": str(ranks.world_size),
        "device": ranks.device.type,
        "code": code,
        "mlflow.source.git.commit": code,  # where MLflow's own pages look
    }


def code_version() -> str:
    """The commit of the code, with a mark if it was changed since; "unknown" outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return found.stdout.strip() or "unknown"
