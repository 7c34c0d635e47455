# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # What the model learned
#
# Experts and gates, whether surfaces pull the shared parameters apart, whose rows gain, which events of a history are
# looked at, and what the embedding tables hold.
#
# | variable | meaning |
# |---|---|
# | `TREFOIL_HOME` | folder of the runs (`MLFLOW_TRACKING_URI` names a server instead) |
# | `TREFOIL_ARMS` | two arms, `NAME=RECIPE`: the reference, and the model that is looked into |
# | `TREFOIL_TASK` | the outcome |
# | `TREFOIL_BATCHES` | batches of the validation days that the model reads |

# %%
# %config InlineBackend.figure_formats = ["retina"]
# %matplotlib inline
import itertools
import os

import pandas as pd
from IPython.display import display

from pipeline.config import default_home
from pipeline.data.flat import seen_users
from pipeline.data.loader import Loader
from pipeline.data.logs import Dataset
from pipeline.errors import ConfigError
from pipeline.evaluate import charts
from pipeline.evaluate.overlap import gain_by_overlap
from pipeline.evaluate.results import parse_arms, predictions_of, runs_of
from pipeline.train import checkpoint
from pipeline.train.days import split_days
from pipeline.train.diagnostics import gate_utilisation, gradient_conflict
from pipeline.train.history_use import attention_by_age
from pipeline.train.table_use import expected_sharing, lookups, row_norms, shared_rows

HOME = default_home().absolute()
ARMS = parse_arms(os.environ.get("TREFOIL_ARMS", "separate=demo_hf+demo_sr+demo_rp unified=demo"))
TASK = os.environ.get("TREFOIL_TASK", "click")
BATCHES = int(os.environ.get("TREFOIL_BATCHES", "20"))

# %%
runs = runs_of(HOME, ARMS)
reference, arm = next(iter(ARMS)), list(ARMS)[-1]
run = next(iter(runs[arm].values()))[0]
path = checkpoint.newest(run.folder / "checkpoints")
state, task = checkpoint.read_state(path), checkpoint.load_task(path).eval()
dataset = Dataset.open(run.tags["data"])
days = split_days(dataset, state.config.days)
layout, tasks, surfaces = state.plan.layout, state.config.tasks, state.config.surfaces
loader = Loader(dataset, layout, state.config.loader, days=days.validation or days.train, seed=0)
batches = list(itertools.islice(loader.batches(0), BATCHES))
print(f"{arm}: run {run.name}, {path.name}; {len(batches)} batches of {', '.join(days.validation or days.train)}")

# %% [markdown]
# ## Gates
#
# Mean weight that the gate of each surface and task gives each expert. Rows that are alike say that surfaces share;
# a column of zeros is an expert that nobody uses. Entropy: 1 = all experts alike, 0 = one expert.

# %%
try:
    gates = gate_utilisation(task, batches)
except ConfigError as lacking:
    gates = {}
    print(lacking)
if gates:
    names = [f"{s} {t}" for s in gates for t in tasks]
    shares = pd.concat([pd.DataFrame(load.utilisation.numpy()) for load in gates.values()]).to_numpy()
    display(
        charts.shares(
            shares,
            rows=names,
            columns=[f"expert {e}" for e in range(shares.shape[1])],
            title=f"{arm}: mean gate weight over the rows",
        )
    )
    entropy = [float(e) for load in gates.values() for e in load.entropy]
    display(pd.DataFrame({"gate": names, "entropy": entropy}).round(3))

# %% [markdown]
# ## Do surfaces pull the shared parameters apart?
#
# Cosine of two surfaces' gradients on the parameters that all surfaces teach. Below 0, a step for one is a step against
# the other. The circle is what training follows in the long run; the square is the mean within one batch, where noise
# pulls it to 0.

# %%
conflict = gradient_conflict(task, batches)
charts.points(
    {
        f"{a}, {b}": {
            "gradients averaged over batches": (of.cosine, *(of.cosine_interval or (None, None))),
            "mean over batches": (of.mean_cosine, *(of.mean_cosine_interval or (None, None))),
        }
        for (a, b), of in conflict.items()
    },
    title=f"{arm}: agreement of the surfaces' gradients, 95 % over batches",
    label="cosine of the gradients; left of the line they oppose each other",
)

# %% [markdown]
# ## Whose rows gain?
#
# Drop in log loss over the reference, by where training had seen the row's user. Gains of users known from another
# surface are what unifying promises.

# %%
judged = {name: seeds[0] for name, seeds in predictions_of(runs).items()}
seen = seen_users(dataset, surfaces=surfaces, training=dict.fromkeys(days.test, days.train))
gains = gain_by_overlap(judged[arm], judged[reference], seen, task=TASK)
charts.points(
    {
        f"{surface}: {group} ({100 * of.row_share:.0f} % of its rows)": {"gain": tuple(of.gain.as_list())}
        for surface, groups in gains.items()
        for group, of in groups.items()
        if of.gain.value is not None
    },
    title=f"{TASK}: gain of {arm} over {reference}, 95 % over users",
    label="drop in log loss of a row, nats; right is better",
)

# %% [markdown]
# ## Which events are looked at?
#
# The attention that events of an age get, over what they would get if all events of a history were looked at alike.

# %%
try:
    history = attention_by_age(task, batches)
except ConfigError as lacking:
    history = {}
    print(lacking)
if history:
    aged = {s: {a: of for a, of in use.ages.items() if of.lift.value is not None} for s, use in history.items()}
    display(
        charts.bands(
            {
                surface: {"lift": charts.Band.of(list(ages), [tuple(of.lift.as_list()) for of in ages.values()])}
                for surface, ages in aged.items()
            },
            title=f"{arm}: attention to events by age, 95 % over users",
            x="age of the event, up to",
            y="over equal attention",
            level=1.0,
        )
    )
    display(
        pd.DataFrame(
            [
                {
                    "surface": surface,
                    "candidates with a history": use.candidates,
                    "attention to no event": use.nothing.value,
                    **{f"events up to {age}": of.events for age, of in use.ages.items()},
                }
                for surface, use in history.items()
            ]
        ).round(3)
    )

# %% [markdown]
# ## Embedding tables
#
# Norms of rows by how often the training days look them up: median, and the band from 10 % to 90 % of the rows. "0" are
# rows that no training batch held, which have their first values.

# %%
training = Loader(dataset, layout, state.config.loader, days=days.train, seed=0)
sizes = {v.name: v.size for v in dataset.schema.vocabularies if v.name in layout.vocabularies.values()}
counts = lookups(layout, sizes, training.batches(0))
norms = row_norms(task, counts)
large = sorted((name for name in norms if sum(n.rows for n in norms[name]) > 20), key=lambda n: -len(norms[n]))[:8]
charts.bands(
    {
        f"{table} ({sum(n.rows for n in norms[table]):,} rows)": {
            "norm": charts.Band(
                x=[n.seen for n in norms[table]],
                y=[n.median for n in norms[table]],
                low=[n.low for n in norms[table]],
                high=[n.high for n in norms[table]],
            )
        }
        for table in large
    },
    title=f"{arm}: norms of embedding rows, median and 10 % to 90 %",
    x="lookups in the training days, at least",
    y="Euclidean norm",
)

# %% [markdown]
# ## Keys that share a row
#
# A hashed vocabulary saves the list of keys and pays with collisions. The curve is what an even hash costs; the points
# are the vocabularies of this log that are hashed.

# %%
collisions = shared_rows(dataset)
if not collisions:
    print("no vocabulary of this log is hashed: each key has a row of its own, and the curve stands alone")
load = [10 ** (k / 20) for k in range(-60, 21)]
charts.bands(
    {
        "collisions": {"expected": charts.Band(x=load, y=[expected_sharing(round(1e6 * k), 1_000_001) for k in load])}
        | {
            name: charts.Band(x=[of.keys / (of.rows - 1)], y=[of.share], joined=False)
            for name, of in collisions.items()
        }
    },
    title="Hashed vocabularies: keys that share their row",
    x="keys for each row of the table",
    y="share of keys",
    log_x=True,
)
