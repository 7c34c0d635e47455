"""trefoil sweep"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.cli.common import console, finish, parse
from pipeline.config import RunConfig, config_to_json, default_home
from pipeline.errors import ConfigError, TrefoilError

DESCRIPTION = """Search a recipe's fields by Optuna, judged on validation days alone; test days are never looked at.

The space is a YAML file:

  metric: click/ne                # mean over surfaces; hf/click/ne is one surface's
  fields:
    optimizer.dense_lr: {low: 0.0003, high: 0.01, log: true}
    model.embedding_dim: {choices: [8, 16, 32]}

Each trial is trained on --folds folds of time and pruned when it is worse than the median of earlier trials after a
fold. The same command goes on with a study that was cut off; several at once, on a shared folder, share its trials.

Example:  trefoil sweep --recipe demo --data logs --space space.yaml --study runs/sweeps/rates --trials 20"""


@dataclass(frozen=True, kw_only=True)
class Args:
    recipe: str
    """A shipped recipe (see `trefoil recipes`), path/to/file.py:function, or a run's config.json."""
    data: Path
    """Folder of the log."""
    space: Path
    """YAML file of the fields to search."""
    study: Path
    """Folder of the study; one that exists is gone on with."""
    trials: int
    """Trials to finish, pruned ones included; by all who work on the study together."""
    folds: int = 3
    """Folds of time that each trial is trained on."""
    nproc: int = 1
    """Processes on this machine for each run."""
    recipe_first: bool = False
    """Make the recipe's own values the first trial, so that the search ends no lower than where it began."""
    json: bool = False
    """Print the result as JSON."""
    quiet: bool = False
    """Print nothing but errors, and with --json the result."""


class RunFailedError(TrefoilError):
    """A trial's run ended with an error, which it has printed."""


def main(argv: list[str]) -> int:
    args = parse(Args, argv, verb="sweep", description=DESCRIPTION)
    for name in ("trials", "folds", "nproc"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise ConfigError("sweeps want Optuna: pip install 'trefoil[sweep]'") from error
    from pipeline.data.logs import Dataset
    from pipeline.recipes import find
    from pipeline.sweep.space import read_space
    from pipeline.sweep.study import Sweep, best_config, work
    from pipeline.tracking import Tracker

    out = console(args)
    config = find(args.recipe)()
    dataset = Dataset.open(args.data)
    space, metric = read_space(args.space, config)
    sweep = Sweep(
        config=config,
        space=space,
        metric=metric,
        days=dataset.days,
        folds=args.folds,
        trials=args.trials,
        folder=args.study,
        recipe_first=args.recipe_first,
    )
    record = Tracker.start(
        args.study.name,
        run_dir=args.study / f"worker-{os.uname().nodename}-{os.getpid()}",
        root=default_home(),
        experiment=f"trefoil/{config.name}",
        tags={"sweep": args.study.name, "recipe": config.name, "dataset": dataset.fingerprint},
        params={"space": json.dumps(space.model_dump(mode="json")), "folds": args.folds},
        rank=0,
    )
    with record:

        def train(fold: RunConfig, folder: Path, tags: dict[str, str]) -> dict[str, Any]:
            return _train(fold, folder, args.data, args.nproc, tags, record.key)

        study = work(sweep, train, lambda text: out.print(text, soft_wrap=True))
        record.log_metrics({f"best/{space.metric}": study.best_value}, step=len(study.trials))
        record.log_artifact(args.study / "best.json")
    _print_table(study, space.metric, out)
    out.print(f"\nbest recipe: {args.study / 'best.json'}; train it with --recipe {args.study / 'best.json'}")
    found = {
        "metric": space.metric,
        "value": study.best_value,
        "values": dict(study.best_params),
        "trials": {
            s.name.lower(): sum(t.state is s for t in study.get_trials(deepcopy=False))
            for s in (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
        },
        "recipe": json.loads(config_to_json(best_config(sweep, study))),
    }
    return finish(found, args.json)


def _train(
    config: RunConfig, folder: Path, data: Path, nproc: int, tags: dict[str, str], parent: str | None
) -> dict[str, Any]:
    """Run one fold in a process of its own, unless its folder already holds the result; its validation metrics.

    Raises:
        RunFailedError: it failed; its output has been printed.
    """
    metrics = folder / "val_metrics.json"
    if not metrics.exists():
        folder.mkdir(parents=True, exist_ok=True)
        recipe = folder / "recipe.json"
        recipe.write_bytes(config_to_json(config))
        command = [
            *(sys.executable, "-m", "pipeline.cli", "train", "--recipe", str(recipe), "--data", str(data)),
            *("--run-dir", str(folder), "--nproc", str(nproc), "--parent", parent or ""),
            *("--tags", *(word for item in tags.items() for word in item)),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RunFailedError(f"the run in {folder} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        if not metrics.exists():
            raise RunFailedError(f"the run in {folder} was told to leave; the same command goes on with it")
    scores: dict[str, Any] = json.loads(metrics.read_text())["runs"]["model"]
    return scores


def _print_table(study: Any, metric: str, out: Console) -> None:
    """The best trials, and how much each field mattered where there are enough to say."""
    rows = sorted(
        (t for t in study.get_trials(deepcopy=False) if t.value is not None and t.state.name == "COMPLETE"),
        key=lambda t: t.value,
        reverse=study.direction.name == "MAXIMIZE",
    )[:10]
    table = Table(title=f"best trials by {metric}, mean over folds")
    fields = list(rows[0].params)
    for heading in ("trial", metric, *fields):
        table.add_column(heading, justify="right")
    for t in rows:
        table.add_row(str(t.number), f"{t.value:.5f}", *(_short(t.params[f]) for f in fields))
    out.print(table)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
