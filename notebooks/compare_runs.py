# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Separate, merged, unified: what one model for all surfaces is worth
#
# Every run is read from MLflow by its tags, and judged on the very same rows. Differences are paired over users. Where
# an arm has several seeds, the wide grey bar adds what training again would change.
#
# | variable | meaning |
# |---|---|
# | `TREFOIL_HOME` | folder of the runs (`MLFLOW_TRACKING_URI` names a server instead) |
# | `TREFOIL_ARMS` | `NAME=RECIPE`, with a plus between models of single surfaces; the first is the reference |
# | `TREFOIL_TASK` | the outcome |
# | `TREFOIL_RESAMPLES` | resamples of users behind each interval |
#
# Runs to look at, from nothing: `python scripts/notebook_data.py`.

# %%
# %config InlineBackend.figure_formats = ["retina"]
# %matplotlib inline
import os

import pandas as pd
from rich.console import Console

from pipeline.config import default_home
from pipeline.evaluate import charts, figures
from pipeline.evaluate.compare import compare
from pipeline.evaluate.report import print_report
from pipeline.evaluate.results import parse_arms, predictions_of, runs_of
from pipeline.evaluate.seeds import curve_over_seeds, over_seeds
from pipeline.tracking.runs import metric_history

HOME = default_home().absolute()
ARMS = parse_arms(os.environ.get("TREFOIL_ARMS", "separate=demo_hf+demo_sr+demo_rp merged=demo_merged unified=demo"))
TASK = os.environ.get("TREFOIL_TASK", "click")
RESAMPLES = int(os.environ.get("TREFOIL_RESAMPLES", "1000"))

# %% [markdown]
# ## The runs

# %%
runs = runs_of(HOME, ARMS)
pd.DataFrame(
    [
        {"arm": arm, "seed": seed, "run": run.name, "log": run.tags["dataset"], "code": run.tags["code"]}
        for arm, seeds in runs.items()
        for seed, parts in seeds.items()
        for run in parts
    ]
)

# %% [markdown]
# ## Values
#
# On the test days, which no model has seen, mean over seeds.

# %%
predictions = predictions_of(runs)
comparison = compare(predictions, resamples=RESAMPLES)
print_report(comparison, console=Console(width=130))

# %% [markdown]
# ## Lifts
#
# A point to the right of the line ranks better than the reference. An interval that holds the line says that other
# users, or other seeds, might have turned it round.

# %%
figures.lifts(comparison, task=TASK, seeds=over_seeds(comparison, predictions, task=TASK))

# %% [markdown]
# Normalised entropy also sees calibration; there, left is better.

# %%
figures.lifts(comparison, task=TASK, metric="ne", seeds=over_seeds(comparison, predictions, task=TASK, metric="ne"))

# %% [markdown]
# ## Ranking
#
# The first seed of each arm.

# %%
figures.roc({arm: seeds[0] for arm, seeds in predictions.items()}, task=TASK, resamples=RESAMPLES)

# %% [markdown]
# ## Learning
#
# Training loss, mean over seeds with Student's 95 % interval of that mean. Seeds differ in first values and in the
# order of the data, so each batch's luck is in it too; of one seed there is no interval. Models of single surfaces see
# their own rows alone, so their losses lie at the level of their surfaces: compare forms, not heights.

# %%
loss = {
    parts[0].tags["recipe"]: curve_over_seeds([metric_history(HOME, run, f"train/{TASK}/loss") for run in parts])
    for seeds in runs.values()
    for parts in zip(*seeds.values(), strict=True)
}
several = min(map(len, runs.values())) > 1
charts.bands(
    {
        recipe: {"loss": charts.Band.of(steps, [tuple(e.as_list()) for e in estimates])}
        for recipe, (steps, estimates) in loss.items()
        if steps
    },
    title=f"{TASK}: training loss"
    + (", mean and 95 % interval over seeds" if several else ", without intervals: one seed"),
    x="step",
    y="log loss, nats",
    columns=3,
)
