"""Sweeps over a made-up objective: what is tried, pruned, gone on with, and never looked at."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from pipeline.config import DaysConfig, RunConfig, config_from_json, with_fields
from pipeline.errors import ConfigError
from pipeline.sweep.space import read_space
from pipeline.sweep.study import STARTUP_TRIALS, Sweep, _next, _revive, best_config, work

CONFIG = RunConfig(name="small", surfaces=("hf", "sr"), tasks=("click",), days=DaysConfig(validation=1, test=2))
DAYS = tuple(f"2026-01-{d:02d}" for d in range(1, 10))
SPACE = """
metric: click/ne
fields:
  optimizer.dense_lr: {low: 0.0001, high: 0.1, log: true}
  model.mixture.experts: {low: 2, high: 8}
  model.deep: {choices: [[64], [128, 64]]}
"""


def sweep_in(folder: Path, *, trials: int = 12, folds: int = 2, text: str = SPACE) -> Sweep:
    path = folder.parent / "space.yaml"
    path.write_text(text)
    space, metric = read_space(path, CONFIG)
    return Sweep(config=CONFIG, space=space, metric=metric, days=DAYS, folds=folds, trials=trials, folder=folder)


def objective(config: RunConfig, folder: Path, tags: dict[str, str]) -> dict[str, Any]:
    """Best at a rate of 0.01 with two layers; hf and sr differ by 0.2."""
    value = abs(config.optimizer.dense_lr - 0.01) + (0.5 if len(config.model.deep) == 1 else 0.0)
    return {s: {"click": {"ne": [value + extra, 0.0, 1.0]}} for s, extra in (("hf", 0.0), ("sr", 0.2))}


def silent(text: str) -> None:
    pass


def test_the_best_trial_becomes_a_recipe(tmp_path: Path) -> None:
    sweep = sweep_in(tmp_path / "study", trials=20)
    study = work(sweep, objective, silent)
    best = config_from_json((tmp_path / "study" / "best.json").read_bytes(), source="best.json")
    assert best == best_config(sweep, study)
    assert best.model.deep == (128, 64)
    # The mean over surfaces: the objective of hf and 0.2 / 2.
    assert study.best_value == pytest.approx(abs(best.optimizer.dense_lr - 0.01) + 0.1)
    assert len(study.trials) == 20


def test_the_recipe_itself_is_the_first_trial_where_that_is_asked(tmp_path: Path) -> None:
    sweep = replace(sweep_in(tmp_path / "study", trials=3), recipe_first=True)
    configs: list[RunConfig] = []

    def train(config: RunConfig, folder: Path, tags: dict[str, str]) -> dict[str, Any]:
        configs.append(replace(config, days=CONFIG.days))
        return objective(config, folder, tags)

    work(sweep, train, silent)
    work(replace(sweep, trials=4), train, silent)  # gone on with, not begun with the recipe again
    assert [config == CONFIG for config in configs[::2]] == [True, False, False, False]


@pytest.mark.parametrize(
    ("field", "values", "why"),
    [
        ("optimizer.dense_lr", "{low: 0.01, high: 0.1}", "0.001 does not lie from 0.01 to 0.1"),
        ("model.deep", "{choices: [[64], [32]]}", r"\[128, 64\] is not among \[\[64\], \[32\]\]"),
    ],
)
def test_a_recipe_outside_its_space_cannot_be_the_first_trial(
    tmp_path: Path, field: str, values: str, why: str
) -> None:
    sweep = sweep_in(tmp_path / "study", text=f"metric: click/ne\nfields: {{{field}: {values}}}")
    with pytest.raises(ConfigError, match=f"its {field} is not searched: {why}"):
        work(replace(sweep, recipe_first=True), objective, silent)


def test_one_worker_tries_the_same_every_time(tmp_path: Path) -> None:
    first, second = (work(sweep_in(tmp_path / n / "study"), objective, silent) for n in made(tmp_path, "a", "b"))
    assert [t.params for t in first.trials] == [t.params for t in second.trials]


def made(folder: Path, *names: str) -> tuple[str, ...]:
    for name in names:
        (folder / name).mkdir()
    return names


def test_folds_validate_on_the_days_before_the_test_days(tmp_path: Path) -> None:
    sweep = sweep_in(tmp_path / "study")
    # Days 8 and 9 are the recipe's test days.
    assert sweep.fold_days(0) == DaysConfig(last="2026-01-07", validation=1, test=0)
    assert sweep.fold_days(5) == DaysConfig(last="2026-01-02", validation=1, test=0)
    with pytest.raises(ConfigError, match="2 folds want 5 days or more, the log has 9"):
        sweep.fold_days(6)


def test_a_trial_worse_than_the_median_is_pruned_after_its_first_fold(tmp_path: Path) -> None:
    seen: list[tuple[str, str]] = []

    def worse_and_worse(config: RunConfig, folder: Path, tags: dict[str, str]) -> dict[str, Any]:
        seen.append((tags["trial"], tags["fold"]))
        return {s: {"click": {"ne": [float(tags["trial"]), 0, 0]}} for s in ("hf", "sr")}

    study = work(sweep_in(tmp_path / "study", trials=STARTUP_TRIALS + 2), worse_and_worse, silent)
    states = [t.state for t in study.trials]
    assert states == [TrialState.COMPLETE] * STARTUP_TRIALS + [TrialState.PRUNED] * 2
    assert seen[-2:] == [(str(STARTUP_TRIALS), "0"), (str(STARTUP_TRIALS + 1), "0")]


def test_a_trial_that_was_cut_off_goes_on_in_its_folder_with_its_values(tmp_path: Path) -> None:
    runs: list[tuple[float, str]] = []

    def cut_off(config: RunConfig, folder: Path, tags: dict[str, str]) -> dict[str, Any]:
        runs.append((config.optimizer.dense_lr, f"{folder.parent.name}/{folder.name}"))
        if len(runs) == 4:
            raise KeyboardInterrupt
        return objective(config, folder, tags)

    with pytest.raises(KeyboardInterrupt):
        work(sweep_in(tmp_path / "study", trials=3), cut_off, silent)
    said: list[str] = []
    study = work(sweep_in(tmp_path / "study", trials=3), cut_off, said.append)
    assert said[0] == "trial 1 was cut off; it is begun again and goes on in trial-1"
    assert [name for _, name in runs[:6]] == [
        *("trial-0/fold-0", "trial-0/fold-1", "trial-1/fold-0", "trial-1/fold-1"),
        *("trial-1/fold-0", "trial-1/fold-1"),
    ]
    assert runs[4][0] == runs[2][0]
    assert sum(t.state is TrialState.COMPLETE for t in study.trials) == 3


def test_a_trial_that_was_only_just_taken_is_not_begun_again_by_another_worker(tmp_path: Path) -> None:
    sweep = sweep_in(tmp_path / "study", trials=2)
    study = work(replace(sweep, trials=1), objective, silent)
    said: list[str] = []
    with _next(sweep, study) as trial:
        assert trial is not None
        trial.suggest_float("optimizer.dense_lr", 0.0001, 0.1, log=True)
        _revive(study, sweep.folder, said.append)
        assert [t.state for t in study.trials] == [TrialState.COMPLETE, TrialState.RUNNING]
        assert said == []
    # Now nobody holds its folder: its worker is gone.
    study = work(sweep, objective, said.append)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE, TrialState.FAIL, TrialState.COMPLETE]
    assert said[0] == "trial 1 was cut off; it is begun again and goes on in trial-1"


def test_a_worker_without_trials_waits_for_the_others_and_stands_in_for_one_that_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = sweep_in(tmp_path / "study", trials=2)
    study = work(replace(sweep, trials=1), objective, silent)
    said: list[str] = []
    other = _next(sweep, study)
    trial = other.__enter__()
    assert trial is not None
    trial.suggest_float("optimizer.dense_lr", 0.0001, 0.1, log=True)

    def dies(seconds: float) -> None:
        assert said == []  # it waited
        other.__exit__(None, None, None)

    monkeypatch.setattr("pipeline.sweep.study.time.sleep", dies)
    ended = work(sweep, objective, said.append)
    assert said[0] == "trial 1 was cut off; it is begun again and goes on in trial-1"
    assert [t.state for t in ended.trials] == [TrialState.COMPLETE, TrialState.FAIL, TrialState.COMPLETE]


def test_a_trial_that_ends_while_another_worker_looks_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = sweep_in(tmp_path / "study", trials=2)
    study = work(replace(sweep, trials=1), objective, silent)
    seen = study.get_trials(states=(TrialState.COMPLETE,))
    looked_up = study.get_trials
    # What a look-up just before the trial's end has found.
    monkeypatch.setattr(study, "get_trials", lambda **kw: seen if "states" in kw else looked_up(**kw))
    _revive(study, sweep.folder, silent)
    assert [t.state for t in looked_up()] == [TrialState.COMPLETE]


def test_two_workers_share_the_trials(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_worker, args=(tmp_path / "study",)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    study = work(sweep_in(tmp_path / "study"), objective, silent)
    assert len(study.trials) == 12
    assert len({t.user_attrs["folder"] for t in study.trials}) == 12


def _worker(folder: Path) -> None:
    work(sweep_in(folder), objective, silent)


def test_values_that_do_not_go_together_prune_the_trial(tmp_path: Path) -> None:
    # 4 heads cannot share a width of 34; each value alone goes with the recipe's other.
    text = "metric: click/ne\nfields:"
    text += "\n  model.history.heads: {choices: [2, 4]}\n  model.history.width: {choices: [32, 34]}"
    said: list[str] = []
    study = work(sweep_in(tmp_path / "study", text=text), objective, said.append)
    wrong = [
        t for t in study.trials if (t.params["model.history.heads"], t.params["model.history.width"]) == ("4", "34")
    ]
    assert wrong
    assert {t.state for t in wrong} == {TrialState.PRUNED}
    assert sum("model.history.width 34 is not a multiple of model.history.heads 4" in text for text in said) == len(
        wrong
    )


def test_a_study_goes_on_after_recipes_have_gained_a_field(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    work(sweep_in(folder, trials=1), objective, silent)
    held = json.loads((folder / "study.json").read_text())
    del held["config"]["model"]["dropout"]
    (folder / "study.json").write_text(json.dumps(held))
    assert len(work(sweep_in(folder, trials=2), objective, silent).trials) == 2


def test_another_study_in_the_folder_is_refused(tmp_path: Path) -> None:
    work(sweep_in(tmp_path / "study", trials=1), objective, silent)
    with pytest.raises(ConfigError, match=r"holds another study \(folds differ\)"):
        work(sweep_in(tmp_path / "study", trials=1, folds=3), objective, silent)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SPACE.replace("dense_lr", "dense_rl"), r"unknown field of optimizer 'dense_rl'; did you mean 'dense_lr'"),
        (SPACE.replace("optimizer.dense", "optimiser.dense"), r"unknown field of the recipe 'optimiser'; did you mean"),
        (SPACE.replace("model.deep:", "model.deep.first:"), r"unknown field of model.deep 'first'"),
        (SPACE.replace("[64], ", "[many], "), r"model\.deep"),
        (SPACE.replace("low: 0.0001, high", "low: 1.0, high"), r"low 1.0 is not below high 0.1"),
        (SPACE.replace("low: 0.0001", "low: -1.0"), r"log: true wants a positive low"),
        (SPACE.replace("click/ne", "clik/ne"), r"metric: unknown task 'clik'; did you mean 'click'"),
        (SPACE.replace("click/ne", "click/accuracy"), r"metric: unknown metric 'accuracy'"),
        (SPACE.replace("click/ne", "rp/click/ne"), r"metric: unknown surface 'rp'"),
        (SPACE.replace("click/ne", "ne"), r"write TASK/METRIC or SURFACE/TASK/METRIC"),
        ("metric: click/ne\nfields: {}", r"fields: Dictionary should have at least 1 item"),
        ("metric: [", r"is not a search space"),
    ],
)
def test_a_wrong_space_is_one_clear_error(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep_in(tmp_path / "study", text=text)


def test_a_metric_that_validation_days_do_not_define_says_so(tmp_path: Path) -> None:
    def undefined(config: RunConfig, folder: Path, tags: dict[str, str]) -> dict[str, Any]:
        return {"hf": {"click": {"ne": [0.9, 0.8, 1.0]}}, "sr": {"click": {"ne": None}}}

    with pytest.raises(ConfigError, match="surface 'sr' do not define click/ne"):
        work(sweep_in(tmp_path / "study"), undefined, silent)


def test_fields_are_changed_and_the_rest_is_kept() -> None:
    changed = with_fields(CONFIG, {"model.history.width": 64, "seed": 7}, source="here")
    assert (changed.model.history.width, changed.seed) == (64, 7)
    assert with_fields(changed, {"model.history.width": 32, "seed": 0}, source="here") == CONFIG
