"""A study: trials of a recipe's fields, each trained on several folds of time, kept in a folder that workers share.

    STUDY/study.json        recipe, space, metric, folds: what every worker must agree on
    STUDY/journal.log       Optuna's journal, which any number of processes may write
    STUDY/trial-N/fold-K/   an ordinary run; trial-N/alive is locked while a worker is at it
    STUDY/best.json         the best trial's whole configuration: a recipe for `trefoil train --recipe`

Fold k validates on the k-th day before the recipe's test days and trains on what lies before it: test days are never
looked at. A trial that is worse than the median of those before it after a fold is pruned (Optuna's MedianPruner).
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from pipeline.config import DaysConfig, RunConfig, config_from_json, config_to_json, with_fields
from pipeline.errors import ConfigError, TrefoilError
from pipeline.sweep.space import Metric, Space

# (configuration of a fold, folder of its run, tags) -> surface -> task -> metric -> [value, low, high]
Train = Callable[[RunConfig, Path, dict[str, str]], dict[str, Any]]
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
# Trials drawn at random before the sampler learns from them and the pruner has a median to go by.
STARTUP_TRIALS = 5
# Seconds between two looks at the others' trials.
POLL_S = 1.0
# User attribute: the folder of a trial's runs, which outlives the worker that began it.
FOLDER = "folder"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What is searched, and how much of it.

    Args:
        config: the recipe.
        space: its fields and their values.
        metric: what trials are judged by.
        days: of the log, in order.
        folds: of time that each trial is trained on.
        trials: to finish in all, by all workers, pruned ones included.
        folder: of the study.
        recipe_first: the recipe's own values are the first trial, so that no search ends below where it began.
    """

    config: RunConfig
    space: Space
    metric: Metric
    days: tuple[str, ...]
    folds: int
    trials: int
    folder: Path
    recipe_first: bool = False

    def fold_days(self, fold: int) -> DaysConfig:
        """Days of a fold: the last day is the one it validates on, and there is no test.

        Raises:
            ConfigError: the log has too few days.
        """
        ours = self.config.days
        used = [d for d in self.days if (ours.first or d) <= d <= (ours.last or d)]
        end = len(used) - ours.test - fold
        if end < 1 + ours.validation:
            raise ConfigError(
                f"{self.folds} folds want {self.folds + ours.test + ours.validation} days or more, the log has "
                f"{len(used)} to use; ask for fewer --folds"
            )
        return replace(ours, last=used[end - 1], test=0)


def work(sweep: Sweep, train: Train, say: Callable[[str], None]) -> optuna.Study:
    """Take trials until the study has enough; any number of workers may do so at once, and it can be called again.

    Trials whose worker died are begun again with the same values in the same folder, so that their runs go on. A worker
    that finds no more trials waits for the others and stands in for those that die: all see the same best trial, and
    launchers that end a job some time after its first process has ended (srun --wait) end no trial.

    Raises:
        ConfigError: the folder holds another study, the log is too short, or the recipe is to be the first trial and
            is not in the space.
    """
    first = sweep.space.stored(sweep.config) if sweep.recipe_first else None
    sweep.fold_days(sweep.folds - 1)
    sweep.folder.mkdir(parents=True, exist_ok=True)
    with _locked(sweep.folder / "study.lock", wait=True):
        _claim(sweep)
        study = open_study(sweep.folder, direction=sweep.metric.direction, seed=sweep.config.seed, first=first)
        _revive(study, sweep.folder, say)
    while True:
        with _next(sweep, study) as trial:
            if trial is not None:
                _try(sweep, study, trial, sweep.folder / trial.user_attrs[FOLDER], train, say)
                continue
        if not study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            break
        time.sleep(POLL_S)
        with _locked(sweep.folder / "study.lock", wait=True):
            _revive(study, sweep.folder, say)
    _write_best(sweep, study)
    return study


@contextmanager
def _next(sweep: Sweep, study: optuna.Study) -> Iterator[optuna.Trial | None]:
    """A trial to take, its folder held until the block ends; None where those that are finished and under way are
    enough."""
    with ExitStack() as held:
        with _locked(sweep.folder / "study.lock", wait=True):
            taken = study.get_trials(deepcopy=False, states=(*FINISHED, TrialState.RUNNING))
            trial = study.ask() if len(taken) < sweep.trials else None
            if trial is not None:
                if FOLDER not in trial.user_attrs:
                    trial.set_user_attr(FOLDER, f"trial-{trial.number}")
                # Before others may look: a trial that runs and whose folder nobody holds is one that was cut off.
                held.enter_context(_locked(sweep.folder / trial.user_attrs[FOLDER] / "alive", wait=False))
        yield trial


def best_config(sweep: Sweep, study: optuna.Study) -> RunConfig:
    """The recipe with the best trial's values.

    Raises:
        ConfigError: no trial was trained on all folds.
    """
    return with_fields(sweep.config, _values(sweep.space, _best(study)), source="best trial")


def _best(study: optuna.Study) -> FrozenTrial:
    try:
        return study.best_trial
    except ValueError as error:
        raise ConfigError("no trial has come to its end; ask for more --trials") from error


def _try(
    sweep: Sweep, study: optuna.Study, trial: optuna.Trial, folder: Path, train: Train, say: Callable[[str], None]
) -> None:
    """Train a trial fold by fold; its value is the mean over folds.

    Values that do not go together prune the trial; a run that fails ends the sweep, as it would fail again.
    """
    values = {field: of.suggest(trial, field) for field, of in sweep.space.fields.items()}
    try:
        config = with_fields(sweep.config, values, source=folder.name)
    except ConfigError as error:
        study.tell(trial, state=TrialState.PRUNED)
        say(f"trial {trial.number}: {error}")
        return
    found: list[float] = []
    try:
        for fold in range(sweep.folds):
            tags = {"sweep": sweep.folder.name, "trial": str(trial.number), "fold": str(fold)}
            scores = train(replace(config, days=sweep.fold_days(fold)), folder / f"fold-{fold}", tags)
            found.append(sweep.metric.of(scores))
            mean = sum(found) / len(found)
            trial.report(mean, fold)
            if fold + 1 < sweep.folds and trial.should_prune():
                study.tell(trial, state=TrialState.PRUNED)
                say(f"trial {trial.number}: pruned after fold {fold + 1} of {sweep.folds} at {mean:.5f}  {values}")
                return
    except TrefoilError:
        study.tell(trial, state=TrialState.FAIL)
        say(f"trial {trial.number}: failed  {values}")
        raise
    study.tell(trial, mean)
    best = "  best so far" if _best(study).number == trial.number else ""
    say(f"trial {trial.number}: {sweep.space.metric} {mean:.5f}{best}  {values}")


def open_study(
    folder: Path, *, direction: Literal["minimize", "maximize"], seed: int, first: dict[str, Any] | None = None
) -> optuna.Study:
    """Optuna's study of a folder, made if it is not there: TPE, pruned by the median.

    Args:
        folder: holds the journal, and names the study.
        direction: minimize or maximize.
        seed: of the sampler.
        first: values of the first trial of a study that has none, as Optuna keeps them.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(folder / "journal.log")))
    known = {s.study_name: s for s in optuna.get_all_study_summaries(storage)}
    done = known[folder.name].n_trials if folder.name in known else 0
    study = optuna.create_study(
        storage=storage,
        study_name=folder.name,
        direction=direction,
        load_if_exists=True,
        # A worker that comes later draws other numbers; one worker alone draws the same on every machine.
        sampler=optuna.samplers.TPESampler(seed=seed + done, n_startup_trials=STARTUP_TRIALS, constant_liar=True),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP_TRIALS),
    )
    if first is not None and not done:
        study.enqueue_trial(first)
    return study


def _claim(sweep: Sweep) -> None:
    """Write what the study is; a folder of another study is an error."""
    description = {
        "config": json.loads(config_to_json(sweep.config)),
        "space": sweep.space.model_dump(mode="json"),
        "days": list(sweep.days),
        "folds": sweep.folds,
    }
    path = sweep.folder / "study.json"
    if path.exists():
        held = json.loads(path.read_text())
        # A field that the recipe has gained since then stands at its default in what is held.
        was = config_from_json(json.dumps(held["config"]).encode(), source=str(path))
        held["config"] = json.loads(config_to_json(was))
        differing = [key for key in description if held.get(key) != description[key]]
        if differing:
            raise ConfigError(
                f"{sweep.folder} holds another study ({', '.join(differing)} differ); give the same recipe, flags, "
                "space and log to go on with it, or another --study"
            )
    path.write_text(json.dumps(description, indent=1) + "\n")


def _revive(study: optuna.Study, folder: Path, say: Callable[[str], None]) -> None:
    """Put trials whose worker is gone back into the queue. A live worker holds the lock of its trial's folder."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        runs = trial.user_attrs.get(FOLDER)
        try:
            with _locked(folder / (runs or f"trial-{trial.number}") / "alive", wait=False):
                # It may have ended since it was looked up; then its worker has let go of the folder alive.
                if study.get_trials(deepcopy=False)[trial.number].state is not TrialState.RUNNING:
                    continue
                study.tell(trial.number, state=TrialState.FAIL)
                if runs is not None and trial.params:
                    study.enqueue_trial(dict(trial.params), user_attrs={FOLDER: runs})
                    say(f"trial {trial.number} was cut off; it is begun again and goes on in {runs}")
        except BlockingIOError:
            continue


def _values(space: Space, trial: FrozenTrial) -> dict[str, Any]:
    fixed = optuna.trial.FixedTrial(trial.params)
    return {field: of.suggest(fixed, field) for field, of in space.fields.items()}  # type: ignore[arg-type]


def _write_best(sweep: Sweep, study: optuna.Study) -> None:
    beside = sweep.folder / f".best.{os.getpid()}"
    beside.write_bytes(config_to_json(best_config(sweep, study)))
    beside.replace(sweep.folder / "best.json")


@contextmanager
def _locked(path: Path, *, wait: bool) -> Iterator[IO[str]]:
    """Hold a file's lock; it is let go when the process ends, however it ends.

    Raises:
        BlockingIOError: another process holds it, and `wait` is False.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield file
