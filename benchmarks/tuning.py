"""Tuning with equal budgets: the same search for every rival of the backtest, on days before its test days.

    python -m benchmarks.tuning --data KUAIRAND_LOG --trials 8

Every rival's recipe gets as many trials of the same space: half to twice its own batch and embedding dimension, a
quarter to four times its own learning rates (`model_space`); LightGBM as many trials of a space of its own
(`TREE_SPACE`) and early stopping in each. The first trial is the recipe as it stands, so nobody ends below it; then
Optuna's TPE (Bergstra et al. 2011) with one seed. A trial that is worse than the median after its first fold is pruned.
"separate" is three models, each searched on its own surface with all the trials: three times as many choices, to its
favour, though each is made on fewer rows. The seed being one, the first five trials are the same for all who have the
same space: the recipe and four drawn at random; only then does TPE choose and pruning set in.

A fold is a day d of those before the backtest's test days, treated as the backtest treats its own: trained up to d-2,
recalibrated (or stopped early) on d-1, scored on d. Judged by the NE of click, averaged over folds, over surfaces
weighted by the square root of their rows. Not the plain mean over surfaces, though macro figures are the headline: sr
has a hundred clicks a day and rp a thousand rows, whose noise would choose; and not the loss of all rows together, of
which hf is nine tenths: it would choose for hf alone. Weights that fall with the square root are near those that give
the least error where surfaces agree about as much as their noise lets one see.

What it does not show: which of two settings is better where they lie within the noise of two days, and what a larger
budget would find. Runs are kept in --work and taken up again. The backtest of what was chosen is
`python -m benchmarks.quality --arms tuned_unified tuned_separate ...` (`pipeline/recipes/kuairand_tuned.py`).
"""

from __future__ import annotations

import json
import math
import multiprocessing
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import tyro
import yaml
from optuna.trial import TrialState

from benchmarks.common import Report
from benchmarks.quality import Run, arms, execute, tree_settings
from pipeline.config import DaysConfig, RunConfig
from pipeline.errors import ConfigError, unknown
from pipeline.recipes.kuairand_tuned import VALUES
from pipeline.sweep.space import Choices, Metric, Range, Space
from pipeline.sweep.study import FINISHED, FOLDER, Sweep, open_study, work

if TYPE_CHECKING:
    from pipeline.evaluate.boosted_trees import BoostedTreesConfig
    from pipeline.evaluate.predictions import Predictions

TASK = "click"
METRIC = Metric(surface=None, task=TASK, name="ne")
# Around LightGBM's settings of now, which are the first trial; the number of trees is stopped early in every trial.
TREE_SPACE: dict[str, Range] = {
    "learning_rate": Range(low=0.01, high=0.1, log=True),
    "leaves": Range(low=5, high=60, log=True),
    "rows_in_leaf": Range(low=50, high=800, log=True),
    "feature_fraction": Range(low=0.3, high=1.0),
    "l2": Range(low=1.0, high=100.0, log=True),
}
# surface -> ne, auc, rows of one day
Scores = dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Settings:
    data: Path | None = None
    """Folder of the log that `trefoil ingest kuairand` wrote; without it nothing is measured, and says so."""
    rivals: tuple[str, ...] = (
        *("unified", "separate", "merged", "mmoe", "ple", "shared_bottom", "star", "din", "boosted_trees"),
    )
    """Arms of `benchmarks.quality` to tune."""
    trials: int = 8
    """Trials of each model, the recipe as it stands and pruned ones included."""
    folds: int = 2
    """Days that each trial is judged on."""
    backtest_days: int = 3
    """Last days of the log, which are the backtest's and are not looked at."""
    work: Path = Path("runs/tuning")
    """Where studies and their runs are kept."""
    write: bool = False
    """Write the chosen values into the recipes (`kuairand_tuned.yaml`); rivals that were not searched keep theirs."""
    jobs: int = 1
    """Searches at a time, each on one thread."""
    quick: bool = False
    """The first and the last rival, two trials of one fold, one day of training: does it run, not what is true."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One search: a rival's model, or one of its three."""

    rival: str
    config: RunConfig
    trees: BoostedTreesConfig | None
    folder: Path
    data: Path
    days: tuple[str, ...]
    folds: int
    trials: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a search found; scores are a fold each, numbers among the values rounded to three digits."""

    part: str
    values: dict[str, Any]
    before: list[Scores]
    after: list[Scores]
    trials: dict[str, int]
    cpu_seconds: float


def model_space(config: RunConfig) -> Space:
    """What is searched of a model: what all rivals share, as far to both sides of the recipe for each of them."""
    learning, batch, dim = config.optimizer, config.loader.requests_per_batch, config.model.embedding_dim
    return Space(
        metric=f"{TASK}/{METRIC.name}",
        fields={
            "optimizer.dense_lr": Range(low=learning.dense_lr / 4, high=learning.dense_lr * 4, log=True),
            "optimizer.sparse_lr": Range(low=learning.sparse_lr / 4, high=learning.sparse_lr * 4, log=True),
            "loader.requests_per_batch": Choices(choices=[batch // 2, batch, batch * 2]),
            "model.embedding_dim": Choices(choices=[dim // 2, dim, dim * 2]),
        },
    )


def plan(settings: Settings, days: tuple[str, ...], data: Path) -> list[Part]:
    """Every search that the settings ask for, over a log of these days.

    Raises:
        ConfigError: a rival that there is not, or a log of too few days.
    """
    known, trees = arms(), tree_settings()
    used = days[: len(days) - settings.backtest_days]
    if len(used) - settings.folds < 2:
        raise ConfigError(
            f"{settings.folds} folds before {settings.backtest_days} test days want "
            f"{settings.folds + settings.backtest_days + 2} days of log or more, not {len(days)}"
        )
    if settings.quick:
        used = used[-3:]
    parts = []
    for rival in settings.rivals:
        if rival not in known:
            raise ConfigError(unknown("arm", rival, known))
        for recipe in known[rival]:
            config = replace(recipe(), days=DaysConfig(first=used[0], validation=1, test=0))
            parts.append(
                Part(
                    rival=rival,
                    config=config,
                    trees=trees.get(rival),
                    folder=settings.work / rival / config.name,
                    data=data,
                    days=used,
                    folds=settings.folds,
                    trials=settings.trials,
                )
            )
    return parts


def search(part: Part) -> Outcome:
    """Take trials until the part has had its number; what an earlier call finished is not run again."""
    sweep = Sweep(
        config=part.config,
        space=model_space(part.config),
        metric=METRIC,
        days=part.days,
        folds=part.folds,
        trials=part.trials,
        folder=part.folder,
        recipe_first=True,
    )

    def train(config: RunConfig, folder: Path, tags: dict[str, str]) -> dict[str, Any]:
        return _scored(judge(part, config, folder))

    if part.trees is None:
        study, fields = work(sweep, train, lambda text: _say(part, text)), sweep.space.fields
    else:
        study, fields = search_trees(part, part.trees, sweep), TREE_SPACE
    # A study that was once asked for more trials than now has no more to choose from than the others.
    counted = study.get_trials(deepcopy=False, states=FINISHED)[: part.trials]
    best = min((t for t in counted if t.state is TrialState.COMPLETE), key=lambda t: t.value or math.inf)
    values = {name: of.suggest(_fixed(best), name) for name, of in fields.items()}
    folds = [f"fold-{i}" for i in range(part.folds)]
    records = [r for t in counted for r in (part.folder / t.user_attrs[FOLDER]).glob("fold-*/run.json")]
    return Outcome(
        part=part.config.name,
        values={n: float(f"{v:.3g}") if isinstance(v, float) else v for n, v in values.items()},
        before=[scores_of(part.folder / "trial-0" / fold) for fold in folds],
        after=[scores_of(part.folder / best.user_attrs[FOLDER] / fold) for fold in folds],
        trials={state.name.lower(): sum(t.state is state for t in counted) for state in FINISHED},
        cpu_seconds=sum(json.loads(record.read_text())["cpu_seconds"] for record in records),
    )


def _fixed(trial: optuna.trial.FrozenTrial) -> Any:
    return optuna.trial.FixedTrial(trial.params)


def search_trees(part: Part, trees: BoostedTreesConfig, sweep: Sweep) -> optuna.Study:
    """The same search over LightGBM's settings, which are no fields of a recipe."""
    part.folder.mkdir(parents=True, exist_ok=True)
    first = {name: of.stored(getattr(trees, name)) for name, of in TREE_SPACE.items()}
    study = open_study(part.folder, direction=METRIC.direction, seed=part.config.seed, first=first)
    for cut_off in study.get_trials(states=(TrialState.RUNNING,)):  # its finished folds are kept
        study.tell(cut_off.number, state=TrialState.FAIL)
        study.enqueue_trial(dict(cut_off.params), user_attrs=cut_off.user_attrs)
    while len(study.get_trials(deepcopy=False, states=FINISHED)) < part.trials:
        trial = study.ask()
        folder = trial.user_attrs.get(FOLDER, f"trial-{trial.number}")
        trial.set_user_attr(FOLDER, folder)
        values = {name: of.suggest(trial, name) for name, of in TREE_SPACE.items()}
        found: list[float] = []
        for fold in range(part.folds):
            config = replace(part.config, days=sweep.fold_days(fold))
            tried = replace(part, trees=replace(trees, **values))
            found.append(weighted_ne(judge(tried, config, part.folder / folder / f"fold-{fold}")))
            trial.report(statistics.mean(found), fold)
            if fold + 1 < part.folds and trial.should_prune():
                study.tell(trial, state=TrialState.PRUNED)
                break
        else:
            study.tell(trial, statistics.mean(found))
        _say(part, f"trial {trial.number}: {statistics.mean(found):.5f} after {len(found)} folds  {values}")
    return study


def judge(part: Part, config: RunConfig, folder: Path) -> Scores:
    """Train up to the day before the last but one, recalibrate on that, score the last; kept runs are not run again.

    Args:
        part: whose settings of boosted trees count, if it has any.
        config: its last day is the one to be judged on.
        folder: of the run.
    """
    day = config.days.last
    assert day is not None, "a fold names its last day"
    config = replace(config, days=replace(config.days, test=1))
    execute(Run(arm=part.rival, config=config, day=day, data=part.data, out=folder / "run.parquet", trees=part.trees))
    scores = day_scores(_read(folder / "run.parquet"), day)
    (folder / "scores.json").write_text(json.dumps(scores))
    return scores


def _read(path: Path) -> Predictions:
    from pipeline.evaluate.predictions import read_predictions

    return read_predictions(path)


def day_scores(predictions: Predictions, day: str) -> Scores:
    """NE, AUC and rows of click on one day by surface.

    Raises:
        ConfigError: a surface has no click on that day, or no other impression.
    """
    from pipeline.evaluate.metrics import evaluate

    scores: Scores = {}
    for surface, tasks in evaluate(predictions.select(dates=(day,))).items():
        found = tasks[TASK]
        ne, auc = found["ne"], found["auc"]
        if ne is None or auc is None:
            raise ConfigError(f"{day} cannot judge {surface}: {found.reasons}; take another --backtest-days")
        scores[surface] = {"ne": ne, "auc": auc, "rows": float(found.rows)}
    return scores


def scores_of(fold: Path) -> Scores:
    """Scores that `judge` has left in a fold's folder."""
    scores: Scores = json.loads((fold / "scores.json").read_text())
    return scores


def weighted_ne(scores: Mapping[str, Mapping[str, float]]) -> float:
    """Mean NE over surfaces, weighted by the square root of their rows."""
    weights = {surface: math.sqrt(of["rows"]) for surface, of in scores.items()}
    return sum(weights[surface] * of["ne"] for surface, of in scores.items()) / sum(weights.values())


def _scored(scores: Scores) -> dict[str, Any]:
    return {"all": {TASK: {"ne": [weighted_ne(scores)]}}}


def figures_of(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """A rival's line: its searches' scores put together as if they were one model's."""
    sides = {}
    for side in ("before", "after"):
        folds = [
            {s: of for scores in parts for s, of in scores.items()}
            for parts in zip(*(getattr(o, side) for o in outcomes), strict=True)
        ]
        sides[side] = {
            "weighted_ne": statistics.mean(weighted_ne(fold) for fold in folds),
            "macro_auc": statistics.mean(of["auc"] for fold in folds for of in fold.values()),
            "ne": {s: statistics.mean(fold[s]["ne"] for fold in folds) for s in folds[0]},
        }
    return {
        "values": {o.part: o.values for o in outcomes},
        **sides,
        "trials": {o.part: o.trials for o in outcomes},
        "cpu_seconds": sum(o.cpu_seconds for o in outcomes),
    }


def _say(part: Part, text: str) -> None:
    print(f"{part.rival} {part.config.name}: {text}", file=sys.stderr, flush=True)


def tuning_figures(settings: Settings, data: Path) -> dict[str, Any]:
    """All searches, each in a process of its own, and their figures by rival."""
    from pipeline.data.logs import Dataset

    parts = plan(settings, Dataset.open(data).days, data)
    context = multiprocessing.get_context("spawn")
    with context.Pool(settings.jobs, maxtasksperchild=1) as pool:
        outcomes = pool.map(search, parts, chunksize=1)
    by_rival: dict[str, list[Outcome]] = {}
    for part, outcome in zip(parts, outcomes, strict=True):
        by_rival.setdefault(part.rival, []).append(outcome)
    return {rival: figures_of(found) for rival, found in by_rival.items()}


def write_values(figures: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Put the rivals' values into the recipes' file; those of rivals that have no figures stay."""
    held = yaml.safe_load(path.read_text()) or {}
    found = {rival: of["values"] for rival, of in figures.items()}
    path.write_text(yaml.safe_dump({**held, **found}, sort_keys=False, default_flow_style=None))


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    if settings.quick:
        ends = tuple(dict.fromkeys((settings.rivals[0], settings.rivals[-1])))
        settings = replace(settings, rivals=ends, trials=2, folds=1)
    report = Report("tuning", settings)
    if settings.data is None:
        report.finish({"skipped": "KuaiRand: give --data, a log written by `trefoil ingest kuairand`"})
    else:
        figures = tuning_figures(settings, settings.data)
        if settings.write:
            write_values(figures, VALUES)
        report.finish(figures)


if __name__ == "__main__":
    main()
