# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # What serving costs, where tables lie, what the gates found
#
# | variable | meaning |
# |---|---|
# | `TREFOIL_HOME` | folder of the runs (`MLFLOW_TRACKING_URI` names a server instead) |
# | `TREFOIL_ARMS` | as in the other notebooks, `NAME=RECIPE` |
# | `TREFOIL_RECIPE` | recipe whose newest run is profiled and planned; by default that of the last arm |
# | `TREFOIL_SECONDS` | longest time to measure one shape of batch |
# | `TREFOIL_GPU`, `TREFOIL_NODES` | cluster to plan for: a100, h100 or h200, and hosts of eight |

# %%
# %config InlineBackend.figure_formats = ["retina"]
# %matplotlib inline
import json
import os

import pandas as pd
from IPython.display import display

from pipeline.config import default_home
from pipeline.data.logs import Dataset
from pipeline.evaluate import charts
from pipeline.evaluate.results import parse_arms, runs_of
from pipeline.rollout.evidence import gate_evidence
from pipeline.serve.profile import by_candidates, profile
from pipeline.tracking.runs import read_artifact
from pipeline.train import checkpoint
from pipeline.train.cluster import Cluster, Workload
from pipeline.train.planner import GPUS
from pipeline.train.quiet import quiet_dependencies

quiet_dependencies()
HOME = default_home().absolute()
ARMS = parse_arms(os.environ.get("TREFOIL_ARMS", "unified=demo"))
RECIPE = os.environ.get("TREFOIL_RECIPE", list(ARMS.values())[-1][0])
SECONDS = float(os.environ.get("TREFOIL_SECONDS", "1"))
CLUSTER = Cluster(
    gpu=GPUS[os.environ.get("TREFOIL_GPU", "h100")], nodes=int(os.environ.get("TREFOIL_NODES", "1")), gpus_per_node=8
)

# %%
run = next(iter(runs_of(HOME, {"model": (RECIPE,)})["model"].values()))[0]
artifacts = {path.name: path for path in sorted((run.folder / "artifacts").glob("*")) if path.is_dir()}
if not artifacts:
    print(f"run {run.name} has no artifacts; make them with `trefoil train --register` or `trefoil export`")
print(f"run {run.name}: artifacts of {', '.join(artifacts) or 'no surface'}")

# %% [markdown]
# ## Latency
#
# One request at a time, on one thread of this machine, made-up rows: median of the whole scorer, from an Arrow table to
# probabilities. Sizes take six turns, and a bar goes from the least to the largest turn's value. The history is paid
# once, however many candidates there are.

# %%
profiles = {
    surface: profile(path, requests=(1,), candidates=(1, 8, 64, 256), seconds=SECONDS)
    for surface, path in artifacts.items()
}
if profiles:
    longest = {surface: max(s["history"] for s in of["shapes"]) for surface, of in profiles.items()}
    display(
        charts.bands(
            {
                f"{surface}, {of['bytes'] / 1e6:.1f} MB": {
                    "no history": by_candidates(of, requests=1, history=0),
                    "full history": by_candidates(of, requests=1, history=longest[surface]),
                    "full history, 99th percentile": by_candidates(
                        of, requests=1, history=longest[surface], percentile="p99"
                    ),
                }
                for surface, of in profiles.items()
            },
            title=f"Latency of a request, {next(iter(profiles.values()))['dtype']} tables, one thread; bars: six turns",
            x="candidates",
            y="milliseconds",
            log_x=True,
            log_y=True,
        )
    )
    display(
        pd.DataFrame(
            [
                {
                    "surface": surface,
                    "candidates": s["candidates"],
                    "history": s["history"],
                    "ms": s["score_ms"]["p50"],
                    "program ms": s["program_ms"]["p50"],
                    "candidates/s": s["candidates_per_second"],
                    "MFLOP": s["flops"] / 1e6,
                    "peak MB": s["peak_mb"],
                }
                for surface, of in profiles.items()
                for s in of["shapes"]
            ]
        ).round(3)
    )

# %% [markdown]
# ## Where tables lay
#
# The plan of the run itself, as it logged it.

# %%
pd.DataFrame(json.loads(read_artifact(HOME, run, "sharding_plan.json"))["tables"])

# %% [markdown]
# ## Where tables would lie
#
# TorchRec's planner on a cluster that is not there: bytes, and times estimated from bandwidths, without the dense part.
# Nothing is measured, so nothing has an interval.

# %%
state = checkpoint.read_state(checkpoint.newest(run.folder / "checkpoints"))
dataset = Dataset.open(run.tags["data"])
candidates = dataset.candidates_per_request(state.config.surfaces)
plan = Workload(state.plan, candidates_per_request=candidates).place(CLUSTER)
pd.DataFrame([vars(p) for p in plan.placements]).assign(gpus=lambda t: [len(g) for g in t["gpus"]])

# %%
parts = {
    "input_dist_comms": "exchange\nof ids",
    "fwd_compute": "forward",
    "fwd_comms": "exchange\nof rows",
    "bwd_compute": "backward",
    "bwd_comms": "exchange\nof gradients",
    "prefetch_compute": "prefetch",
}
charts.bars(
    {parts[part]: {"": (1e3 * plan.step_ms[part],) * 3} for part in parts if plan.step_ms.get(part)},
    title=f"Embeddings in a step on {CLUSTER}: {1e3 * plan.step_ms['total']:.3g} microseconds, estimated",
    label="microseconds on the slowest GPU",
)

# %% [markdown]
# ## What the gates found
#
# The newest decision on each surface in each wave, from the evidence that it left in MLflow. Wave 0 is the separate
# models, judged against the trivial baseline where nothing served before.

# %%
evidence = gate_evidence(HOME)
if not evidence:
    print("no wave has been through the gates here; `trefoil rollout plan` and `trefoil rollout run` make one")
found = pd.DataFrame(
    [
        {
            "wave": e.wave,
            "surface": e.surface,
            "against": "trivial baseline" if e.champion is None else f"champion {e.champion}",
            "passed": e.decision.passed,
            "gates": len(e.decision.verdicts),
            "stopped by": "; ".join(map(str, e.decision.failures)),
        }
        for e in evidence
    ]
)
with pd.option_context("display.max_colwidth", None):
    display(found)

# %%
if evidence:
    display(
        charts.points(
            {
                f"wave {e.wave}, {e.surface}": {
                    task: (d.value, d.low, d.high)
                    for task, of in e.measured.tasks.items()
                    if (d := of.auc_difference) is not None
                }
                for e in evidence
            },
            title="AUC less the champion's, or the trivial baseline's, 95 % over users",
            label="difference in AUC; right is better",
        )
    )

# %%
# Wave 0 is the separate models themselves. The interval is that of the median over rounds of timing in one process:
# how well this machine tells, not how other machines would do.
costs = {
    f"wave {e.wave}, {e.surface}": {
        "over separate": (e.measured.cost.over_separate, *(e.measured.cost.over_separate_interval or (None, None)))
    }
    for e in evidence
    if e.wave and e.measured.cost.over_separate is not None
}
if costs:
    display(
        charts.points(
            costs,
            title="Cost of serving over that of the surface's separate model, 95 % over rounds",
            label="ratio of processor times, median over rounds; left is cheaper",
            at=1.0,
        )
    )
