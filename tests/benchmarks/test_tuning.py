"""The search over rivals, with training replaced by a formula: equal budgets, honest days, nobody below his recipe."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import tuning
from benchmarks.quality import arms
from benchmarks.tuning import Part, Scores, Settings, figures_of, model_space, plan, search, weighted_ne, write_values
from pipeline.config import RunConfig, with_fields
from pipeline.errors import ConfigError
from pipeline.recipes.kuairand_tuned import RIVALS, tuned
from pipeline.sweep.space import Choices

DAYS = tuple(f"2022-05-{d:02d}" for d in range(1, 12))
ROWS = {"hf": 15_000.0, "sr": 1_600.0, "rp": 1_100.0}


def parts(folder: Path, *rivals: str, **more: Any) -> list[Part]:
    settings = Settings(work=folder, **({"rivals": rivals} if rivals else {}), **more)
    return plan(settings, DAYS, folder)


def formula(part: Part, config: RunConfig, folder: Path) -> Scores:
    """Best at twice the recipe's rate, or at 25 leaves; each day has its own level."""
    if part.trees is None:
        wrong = abs(math.log(config.optimizer.dense_lr / 4e-3))
    else:
        wrong = abs(math.log(part.trees.leaves / 25))
    level = 0.9 + 0.01 * (config.days.last == DAYS[-4])
    scores = {s: {"ne": level + 0.01 * wrong, "auc": 0.7 - 0.01 * wrong, "rows": ROWS[s]} for s in config.surfaces}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scores.json").write_text(json.dumps(scores))
    (folder / "run.json").write_text(json.dumps({"cpu_seconds": 2.0}))
    return scores


def test_every_rival_has_the_same_room_around_his_own_recipe(tmp_path: Path) -> None:
    found = parts(tmp_path)
    assert [p.config.name for p in found if p.rival == "separate"] == ["kuairand_hf", "kuairand_sr", "kuairand_rp"]
    assert len({(p.trials, p.folds, p.days, p.config.epochs) for p in found}) == 1
    for part in found:
        space = model_space(part.config)
        own = {
            field: json.loads(v) if isinstance(space.fields[field], Choices) else v
            for field, v in space.stored(part.config).items()
        }
        assert with_fields(part.config, own, source="here") == part.config
        rate, batch = space.fields["optimizer.dense_lr"], space.fields["loader.requests_per_batch"]
        assert rate.model_dump() == {"low": 5e-4, "high": 8e-3, "log": True}
        middle = part.config.loader.requests_per_batch
        assert batch.model_dump() == {"choices": [middle // 2, middle, middle * 2]}


def test_days_of_the_backtest_are_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str | None, str | None, int, int]] = []

    def run(part: Part, config: RunConfig, folder: Path) -> Scores:
        ran.append((config.days.first, config.days.last, config.days.validation, config.days.test))
        return formula(part, config, folder)

    monkeypatch.setattr(tuning, "judge", run)
    search(parts(tmp_path, "unified", trials=1)[0])
    # 05-09 to 05-11 are the backtest's; `judge` makes of each a day to recalibrate on and a day to score.
    assert ran == [(DAYS[0], "2022-05-08", 1, 0), (DAYS[0], "2022-05-07", 1, 0)]
    assert parts(tmp_path, "unified", quick=True)[0].days == DAYS[5:8]
    with pytest.raises(ConfigError, match="7 folds before 3 test days want 12 days of log or more, not 11"):
        parts(tmp_path, "unified", folds=7)
    with pytest.raises(ConfigError, match="unknown arm 'unfied'"):
        parts(tmp_path, "unfied")


def test_a_fold_is_a_day_of_the_backtest_moved_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Any] = []
    monkeypatch.setattr(tuning, "execute", runs.append)
    monkeypatch.setattr(tuning, "_read", lambda path: path)
    monkeypatch.setattr(tuning, "day_scores", lambda predictions, day: {"hf": {"ne": 0.9, "auc": 0.7, "rows": 1.0}})
    part = parts(tmp_path, "boosted_trees")[0]
    fold = replace(part.config, days=replace(part.config.days, last="2022-05-08"))
    (tmp_path / "fold").mkdir()
    assert tuning.judge(part, fold, tmp_path / "fold") == tuning.scores_of(tmp_path / "fold")
    (run,) = runs
    assert (run.day, run.trees, run.out) == ("2022-05-08", part.trees, tmp_path / "fold" / "run.parquet")
    assert (run.config.days.last, run.config.days.validation, run.config.days.test) == ("2022-05-08", 1, 1)


@pytest.mark.parametrize("rival", ["unified", "boosted_trees"])
def test_a_search_starts_from_the_recipe_and_goes_on_where_it_was_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rival: str
) -> None:
    part = parts(tmp_path, rival, trials=7)[0]
    calls: list[Path] = []

    def cut_off(part: Part, config: RunConfig, folder: Path) -> Scores:
        calls.append(folder)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return formula(part, config, folder)

    monkeypatch.setattr(tuning, "judge", cut_off)
    with pytest.raises(KeyboardInterrupt):
        search(part)
    outcome = search(part)
    assert calls[4].parent == calls[3].parent == part.folder / "trial-1"
    assert sum(outcome.trials.values()) == 7
    own = math.log(2) if rival == "unified" else math.log(25 / 15)
    assert [fold["hf"]["ne"] for fold in outcome.before] == pytest.approx([0.91 + 0.01 * own, 0.9 + 0.01 * own])
    assert outcome.after[0]["hf"]["ne"] < outcome.before[0]["hf"]["ne"]
    assert outcome.cpu_seconds == 2.0 * len(set(calls))
    best = outcome.values["optimizer.dense_lr"] if rival == "unified" else outcome.values["leaves"]
    wrong = abs(math.log(best / (4e-3 if rival == "unified" else 25)))
    # The rate is rounded to three digits.
    assert outcome.after[1]["hf"]["ne"] == pytest.approx(0.9 + 0.01 * wrong, abs=1e-4)
    # Finished: nothing is run again.
    done = len(calls)
    assert search(part) == outcome
    assert len(calls) == done


def test_weights_by_hand() -> None:
    scores = {"hf": {"ne": 0.9, "rows": 900.0}, "sr": {"ne": 1.0, "rows": 100.0}}
    assert weighted_ne(scores) == pytest.approx((30 * 0.9 + 10 * 1.0) / 40)


def test_models_of_single_surfaces_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "judge", formula)
    found = {r: figures_of([search(p) for p in parts(tmp_path, r, trials=1)]) for r in ("unified", "separate")}
    assert found["separate"]["before"] == found["unified"]["before"]
    assert set(found["separate"]["values"]) == {"kuairand_hf", "kuairand_sr", "kuairand_rp"}
    assert found["separate"]["values"]["kuairand_sr"]["loader.requests_per_batch"] == 64
    assert found["separate"]["cpu_seconds"] == 3 * found["unified"]["cpu_seconds"]


def test_a_study_that_had_more_trials_has_no_more_to_choose_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def better_and_better(part: Part, config: RunConfig, folder: Path) -> Scores:
        formula(part, config, folder)
        number = int(folder.parent.name.removeprefix("trial-"))
        scores = {"hf": {"ne": 1.0 - 0.01 * number, "auc": 0.5, "rows": 1.0}}
        (folder / "scores.json").write_text(json.dumps(scores))
        return scores

    monkeypatch.setattr(tuning, "judge", better_and_better)
    part = parts(tmp_path, "unified", trials=4)[0]
    assert search(part).after[0]["hf"]["ne"] == pytest.approx(0.97)
    fewer = search(replace(part, trials=2))
    assert fewer.trials == {"complete": 2, "pruned": 0}
    assert fewer.after[0]["hf"]["ne"] == pytest.approx(0.99)


def test_chosen_values_become_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "judge", formula)
    figures = {r: figures_of([search(p) for p in parts(tmp_path, r, trials=2)]) for r in ("separate", "boosted_trees")}
    path = tmp_path / "values.yaml"
    path.write_text("din: {kuairand_din: {optimizer.dense_lr: 0.001}}\n")
    write_values(figures, path)
    held = yaml.safe_load(path.read_text())
    assert list(held) == ["din", "separate", "boosted_trees"]
    assert set(held["boosted_trees"]["kuairand"]) == set(tuning.TREE_SPACE)
    made = {arm: [recipe() for recipe in recipes] for arm, recipes in tuned(held).items()}
    assert list(made) == ["tuned_din", "tuned_separate", "tuned_boosted_trees"]
    assert made["tuned_din"][0].optimizer.dense_lr == 0.001
    assert [c.surfaces for c in made["tuned_separate"]] == [("hf",), ("sr",), ("rp",)]
    sr = held["separate"]["kuairand_sr"]
    assert made["tuned_separate"][1].loader.requests_per_batch == sr["loader.requests_per_batch"]
    assert made["tuned_separate"][1].optimizer.sparse_lr == sr["optimizer.sparse_lr"]
    with pytest.raises(ConfigError, match="'dense_rl'"):
        tuned({"din": {"kuairand_din": {"optimizer.dense_rl": 0.001}}})


def test_every_rival_that_is_searched_has_a_recipe_to_be_tuned() -> None:
    assert set(RIVALS) == set(Settings().rivals)
    known = arms()
    for rival, recipes in RIVALS.items():
        assert [r() for r in recipes] == [r() for r in known[rival]]
