"""trefoil simulate"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from pipeline.cli.common import console, finish, parse
from pipeline.data.simulate import SimulationConfig, simulate
from pipeline.progress import Bar

DESCRIPTION = """Make multi-surface ads logs whose true probabilities are known.

Example:  trefoil simulate --out logs --requests 30000 --days 7 --seed 0"""


@dataclass(frozen=True, kw_only=True)
class Args:
    out: Path
    """Folder to write; must not yet hold a log."""
    json: bool = False
    """Print the result as JSON."""
    quiet: bool = False
    """Print nothing but errors, and with --json the result."""
    config: Annotated[SimulationConfig, tyro.conf.arg(name="")] = field(default_factory=SimulationConfig)


def main(argv: list[str]) -> int:
    args = parse(Args, argv, verb="simulate", description=DESCRIPTION)
    out = console(args)
    with Bar(out, "requests") as bar:
        dataset = simulate(args.out, args.config, bar)
    sizes = {s: sum(p.requests for p in dataset.partitions(s)) for s in dataset.schema.surfaces}
    shown = sum(p.impressions for p in dataset.description.partitions)
    out.print(f"wrote {args.out}: {sum(sizes.values()):,} requests, {shown:,} impressions, {len(dataset.days)} days")
    out.print(f"next: trefoil train --recipe demo --data {args.out} --nproc 2")
    return finish({"data": str(args.out), "requests": sizes, "impressions": shown, "days": dataset.days}, args.json)
