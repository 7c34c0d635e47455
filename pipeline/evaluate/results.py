"""Predictions of recorded runs, put together by recipe and seed for `compare` and the figures."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from pipeline.errors import ConfigError, DataError, unknown
from pipeline.evaluate.predictions import Predictions, read_predictions
from pipeline.tracking.runs import FoundRun, find_runs, newest_by_seed

Arms = Mapping[str, Sequence[str]]


def parse_arms(text: str) -> dict[str, tuple[str, ...]]:
    """Arms as they are written in one line; the first is what others are compared with.

    >>> parse_arms("separate=demo_hf+demo_sr unified=demo")
    {'separate': ('demo_hf', 'demo_sr'), 'unified': ('demo',)}

    Raises:
        ConfigError: a part is not NAME=RECIPE or NAME=RECIPE+RECIPE.
    """
    arms = {}
    for part in text.split():
        name, equals, recipes = part.partition("=")
        names = tuple(recipes.split("+"))
        if not equals or not name or not all(names) or name in arms:
            raise ConfigError(
                f"{part!r} names no runs, or their name is taken; write NAME=RECIPE, with a plus between models of "
                "single surfaces, as in: separate=demo_hf+demo_sr+demo_rp unified=demo"
            )
        arms[name] = names
    if not arms:
        raise ConfigError("no runs are named; write NAME=RECIPE, as in: merged=demo_merged unified=demo")
    return arms


def runs_of(
    root: str | os.PathLike[str], arms: Arms, *, dataset: str | None = None
) -> dict[str, dict[int, tuple[FoundRun, ...]]]:
    """The newest finished runs of each arm, by seed.

    Args:
        root: folder of the embedded store, where `MLFLOW_TRACKING_URI` names no server.
        arms: name -> recipes; an arm of several recipes is the models of single surfaces, and a seed counts where each
            has a run.
        dataset: fingerprint of the log; that of the newest run of the first arm by default.

    Raises:
        DataError: there is no store, or an arm has no run; says which recipes have some.
    """
    found: dict[str, dict[int, tuple[FoundRun, ...]]] = {}
    for arm, recipes in arms.items():
        by_recipe = []
        for recipe in recipes:
            wanted = {"recipe": recipe} | ({} if dataset is None else {"dataset": dataset})
            # A sweep's trials, and exports and decisions of a run, bear the recipe's name too, and are not the run.
            runs = [r for r in find_runs(root, wanted) if not {"sweep", "kind"} & r.tags.keys()]
            if not runs:
                raise DataError(_missing(root, arm, recipe, dataset))
            dataset = dataset or runs[0].tags["dataset"]
            by_recipe.append(newest_by_seed([r for r in runs if r.tags["dataset"] == dataset]))
        seeds = sorted(set.intersection(*(set(runs) for runs in by_recipe)))
        if not seeds:
            raise DataError(f"{arm}: the runs of {', '.join(recipes)} have no seed in common; train each with one")
        found[arm] = {seed: tuple(runs[seed] for runs in by_recipe) for seed in seeds}
    return found


def predictions_of(
    arms: Mapping[str, Mapping[int, Sequence[FoundRun]]], *, split: str = "test"
) -> dict[str, list[Predictions]]:
    """Predictions of each arm, one set a seed: what `compare` takes.

    Args:
        arms: from `runs_of`.
        split: test or val.

    Raises:
        DataError: a run's folder or its predictions are not here, or are damaged.
    """
    return {
        arm: [
            Predictions.concat([read_predictions(run.folder / "predictions" / f"{split}.parquet") for run in runs])
            for runs in seeds.values()
        ]
        for arm, seeds in arms.items()
    }


def _missing(root: str | os.PathLike[str], arm: str, recipe: str, dataset: str | None) -> str:
    known = {r.tags["recipe"] for r in find_runs(root, {}) if "recipe" in r.tags}
    if recipe in known:
        return f"{arm}: no finished run of recipe {recipe!r} is on the log {dataset} that the others are on"
    return f"{arm}: no finished run of it; " + unknown("recipe", recipe, known)
