"""trefoil plan"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from pipeline.cli.common import console, finish, parse
from pipeline.cli.launch import recipe_name
from pipeline.config import RunConfig
from pipeline.errors import ConfigError
from pipeline.recipes import find

if TYPE_CHECKING:
    from pipeline.train.cluster import ClusterPlan, Workload

DESCRIPTION = """What TorchRec's planner would do with a recipe's tables on a cluster that is not there.

Reports where each table lies, memory by kind, the estimated time of a step's embedding part, and the fewest hosts that
hold the tables. If none of that works (status 1), says which tables are too large and what would make them fit. Needs
no GPU. Every field of the recipe is a flag.

Example:  trefoil plan --recipe ten_terabytes --nodes 8 --gpus-per-node 8 --gpu h100"""


@dataclass(frozen=True, kw_only=True)
class Args:
    recipe: str
    """A shipped recipe (see `trefoil recipes`), or path/to/file.py:function."""
    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    nodes: int = 1
    """Hosts."""
    gpus_per_node: int = 8
    """GPUs of a host."""
    gpu: Literal["a100", "h100", "h200"] = "h100"
    """Kind of GPU, with the memory and bandwidths of its maker's eight-GPU host."""
    data: Path | None = None
    """Folder of a log, whose schema and mean candidates are used in place of those that the recipe assumes."""
    smallest: bool = True
    """Search the fewest hosts that hold the tables."""
    at_most: int = 128
    """Hosts at which that search ends."""
    json: bool = False
    """Print the result as JSON."""
    quiet: bool = False
    """Print nothing but errors, and with --json the result."""


def main(argv: list[str]) -> int:
    recipe = recipe_name(argv)
    default = Args(recipe=recipe or "ten_terabytes", config=find(recipe or "ten_terabytes")())
    args = parse(Args, argv, verb="plan", description=DESCRIPTION, default=default)
    for name in ("nodes", "gpus_per_node", "at_most"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    from pipeline.train.cluster import Cluster, DoesNotFitError  # here, because they bring torch
    from pipeline.train.planner import GPUS
    from pipeline.train.quiet import quiet_dependencies

    quiet_dependencies()
    out = console(args)
    workload = _workload(args)
    cluster = Cluster(gpu=GPUS[args.gpu], nodes=args.nodes, gpus_per_node=args.gpus_per_node)
    out.print(
        f"recipe {args.config.name}: {len(workload.tables)} tables, {workload.bytes / 1e9:,.1f} GB of weights; "
        f"{workload.requests_per_gpu(cluster):,} requests x {workload.candidates_per_request:.4g} candidates a GPU",
        soft_wrap=True,
    )
    result: dict[str, Any] = {"recipe": args.config.name, "table_bytes": workload.bytes}
    status = 0
    plan: ClusterPlan | None = None
    with out.status(f"planning {cluster}"):
        try:
            plan = workload.place(cluster)
        except DoesNotFitError as error:
            status = 1
            print(f"trefoil plan: {error}", file=sys.stderr)
            result |= {"error": str(error), "would_fit_with": workload.what_would_fit(cluster)}
    if plan is not None:
        result |= plan.as_dict()
        _print_plan(out, plan)
    else:
        for what in result["would_fit_with"]:
            out.print(f"it would fit if you {what}", soft_wrap=True)
    if args.smallest:
        result["smallest"] = _smallest(out, workload, cluster, plan, args.at_most)
    finish(result, args.json)
    return status


def _workload(args: Args) -> Workload:
    from pipeline.data.logs import Dataset
    from pipeline.schema import Kind
    from pipeline.train.assumed import assumed_schema
    from pipeline.train.cluster import Workload
    from pipeline.train.model_plan import model_plan

    config = args.config
    candidates = config.sharding.workload.candidates_per_request
    if args.data is None:
        schema = assumed_schema(config)
    else:
        dataset = Dataset.open(args.data, check_files=False)
        schema, candidates = dataset.schema, dataset.candidates_per_request(config.surfaces)
    # Moments scale numbers, which takes no memory and no time.
    moments = {f.name: (0.0, 1.0) for f in schema.select(kind=Kind.NUMERIC)}
    return Workload(model_plan(config, schema, moments), candidates_per_request=candidates)


def _smallest(
    out: Console, workload: Workload, cluster: Any, plan: ClusterPlan | None, at_most: int
) -> dict[str, Any] | None:
    """The fewest hosts; where the asked ones do, only fewer are tried."""
    with out.status("searching the smallest cluster") as status:
        found = workload.smallest(
            replace(cluster, nodes=1),
            at_most=at_most if plan is None else min(cluster.nodes - 1, at_most),
            tell=status.update,
        )
    found = found or plan
    if found is None:
        out.print(f"no cluster of up to {at_most} such hosts holds the tables")
        return None
    out.print(
        f"smallest that fits: {found.cluster}, embedding part {found.step_ms['total']:,.2f} ms a step", soft_wrap=True
    )
    return {
        "nodes": found.cluster.nodes,
        "gpus": found.cluster.gpus,
        "embedding_step_ms_of_slowest_gpu": found.step_ms,
    }


def _print_plan(out: Console, plan: ClusterPlan) -> None:
    tables = Table(title=f"plan for {plan.cluster}")
    for heading in ("table", "module", "rows", "dim", "GB", "sharding", "kernel", "optimizer", "shards", "GPUs"):
        tables.add_column(heading, justify="right" if heading in ("rows", "dim", "GB", "shards") else "left")
    for p in plan.placements:
        gpus = ", ".join(map(str, p.gpus)) if len(p.gpus) <= 4 else f"{p.gpus[0]} to {p.gpus[-1]} ({len(p.gpus)})"
        tables.add_row(
            p.table,
            p.module,
            f"{p.rows:,}",
            str(p.dim),
            f"{p.bytes / 1e9:,.2f}",
            p.sharding,
            p.kernel,
            p.optimizer,
            str(p.shards),
            gpus,
        )
    out.print(tables)
    kinds = Counter((p.sharding, p.kernel) for p in plan.placements)
    out.print("; ".join(f"{n} {sharding} {kernel}" for (sharding, kernel), n in sorted(kinds.items())))
    memory = Table(title="memory, GB")
    memory.add_column("of the fullest")
    names = list(dict.fromkeys([*plan.hbm, *plan.ddr]))
    for name in names:
        memory.add_column(name, justify="right")
    for where, sizes in (("GPU", plan.hbm), ("host", plan.ddr)):
        memory.add_row(where, *(f"{sizes[n] / 1e9:,.2f}" if n in sizes else "-" for n in names))
    out.print(memory)
    times = Table(title="estimated milliseconds of a step's embedding part on the slowest GPU")
    for part in plan.step_ms:
        times.add_column(part, justify="right")
    times.add_row(*(f"{ms:,.3f}" for ms in plan.step_ms.values()))
    out.print(times)
    out.print(f"mean over GPUs {plan.mean_step_ms:,.3f} ms; the dense part comes on top", soft_wrap=True)
