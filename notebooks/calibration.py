# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Calibration, whole and by slice
#
# Auctions use probabilities, not ranks: a prediction of 5 % must come true 5 times in 100, on every surface, for new
# users and new ads as for known ones, day after day.
#
# | variable | meaning |
# |---|---|
# | `TREFOIL_HOME` | folder of the runs (`MLFLOW_TRACKING_URI` names a server instead) |
# | `TREFOIL_ARMS` | runs to show, `NAME=RECIPE`; slices are those of the last |
# | `TREFOIL_TASK` | the outcome |
# | `TREFOIL_RESAMPLES` | resamples of users behind each interval |

# %%
# %config InlineBackend.figure_formats = ["retina"]
# %matplotlib inline
import os

import pandas as pd

from pipeline.config import config_from_json, default_home
from pipeline.data.logs import Dataset
from pipeline.evaluate import charts, figures
from pipeline.evaluate.compare import compare
from pipeline.evaluate.predictions import Predictions
from pipeline.evaluate.results import parse_arms, predictions_of, runs_of
from pipeline.rollout.quality import calibration_slices, mark_new, with_items
from pipeline.train.days import split_days

HOME = default_home().absolute()
ARMS = parse_arms(os.environ.get("TREFOIL_ARMS", "separate=demo_hf+demo_sr+demo_rp merged=demo_merged unified=demo"))
TASK = os.environ.get("TREFOIL_TASK", "click")
RESAMPLES = int(os.environ.get("TREFOIL_RESAMPLES", "1000"))

# %%
runs = runs_of(HOME, ARMS)
predictions = {arm: seeds[0] for arm, seeds in predictions_of(runs).items()}
arm = list(ARMS)[-1]
run = next(iter(runs[arm].values()))[0]
dataset = Dataset.open(run.tags["data"])
days = split_days(dataset, config_from_json((run.folder / "config.json").read_bytes(), source=run.name).days)
print(f"{arm}: run {run.name}; trained on {days.train[0]} to {days.train[-1]}, tested on {', '.join(days.test)}")

# %% [markdown]
# ## Overall
#
# Sum of probabilities over sum of outcomes on the test days: above 1 predicts too much.

# %%
comparison = compare(predictions, resamples=RESAMPLES)
charts.points(
    {
        surface: {name: tuple(comparison.scores[name][surface][TASK]["calibration"].as_list()) for name in predictions}
        for surface in predictions[arm].surfaces
    },
    title=f"{TASK}: calibration on the test days, 95 % over users",
    label="sum of probabilities over sum of outcomes",
    at=1.0,
)

# %% [markdown]
# ## Reliability
#
# Each point is a tenth of the rows by score; on the diagonal the prediction comes true.

# %%
figures.reliability(predictions, task=TASK)

# %% [markdown]
# ## What the calibration layer does
#
# The same model before its calibration per surface and task, and after it. Calibration moves points along the
# horizontal axis and never changes their order.

# %%
figures.reliability(
    {"before": predictions[arm].using("raw"), "after": predictions[arm]},
    task=TASK,
    title=f"{TASK}: reliability of {arm} before and after its calibration layer, 95 % over rows",
)

# %% [markdown]
# ## Slices
#
# Deciles of the score from low to high, users and ads that training had not seen ("new"), and days. Few positives make
# wide intervals: a slice is wrong where its interval leaves out 1.

# %%
found = {}
for surface in predictions[arm].surfaces:
    rows = with_items(predictions[arm].select(surfaces=[surface]), dataset)
    found[surface] = calibration_slices(mark_new(rows, dataset, days.train), TASK, resamples=RESAMPLES)
pd.DataFrame(
    [
        {
            "surface": surface,
            "kind": kind,
            "slice": name,
            "rows": part.rows,
            "positives": part.positives,
            "calibration": None if part.calibration is None else part.calibration.value,
            "low": None if part.calibration is None else part.calibration.low,
            "high": None if part.calibration is None else part.calibration.high,
        }
        for surface, kinds in found.items()
        for kind, parts in kinds.items()
        for name, part in parts.items()
    ]
).round(3)

# %%
figures.slices(
    {
        surface: {
            kind: {
                name.removeprefix("20"): (None, None, None)
                if part.calibration is None
                else (part.calibration.value, part.calibration.low, part.calibration.high)
                for name, part in parts.items()
            }
            for kind, parts in kinds.items()
        }
        for surface, kinds in found.items()
    },
    title=f"{TASK}: calibration of {arm} by slice, 95 % over users",
    label="sum of probabilities over sum of outcomes",
)

# %% [markdown]
# ## Day after day
#
# Validation days beside test days. Where a run is recalibrated on its validation days, these are no proof.

# %%
both = Predictions.concat([predictions_of({arm: runs[arm]}, split="val")[arm][0], predictions[arm]])
daily = {day: compare({arm: both.select(dates=[day])}, resamples=RESAMPLES).scores[arm] for day in both.dates}
charts.bands(
    {
        surface: {
            arm: charts.Band.of(
                [day[5:] for day in daily],
                [tuple(of[surface][TASK]["calibration"].as_list()) for of in daily.values()],
            )
        }
        for surface in predictions[arm].surfaces
    },
    title=f"{TASK}: calibration of {arm} by day, 95 % over users",
    x="day",
    y="predicted over observed",
    level=1.0,
)
