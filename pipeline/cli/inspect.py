"""trefoil inspect"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pipeline.cli.common import console, finish, parse
from pipeline.data.inspect import Inspection, inspect
from pipeline.schema import Kind

MOST_DAYS = 7
DESCRIPTION = """What a log holds, per surface and day, and everything that is wrong with it (then the status is 1).

Example:  trefoil inspect logs"""


@dataclass(frozen=True, kw_only=True)
class Args:
    data: Annotated[Path, tyro.conf.Positional]
    """Folder of a log."""
    by_day: bool | None = None
    """Show each day beside the totals of a surface; none given shows days where there are at most 7."""
    json: bool = False
    """Print the result as JSON."""
    quiet: bool = False
    """Print nothing but errors, and with --json the result."""


def main(argv: list[str]) -> int:
    args = parse(Args, argv, verb="inspect", description=DESCRIPTION)
    out = console(args)
    with out.status(f"reading {args.data}"):
        found = inspect(args.data)
    result = found.as_dict()
    days = sorted({day for _, day in found.tallies})
    by_day = len(days) <= MOST_DAYS if args.by_day is None else args.by_day
    out.print(_headline(args.data, found, days), highlight=False)
    _print_days(out, found, result, by_day)
    if not by_day:
        out.print(f"{len(days)} days together; --by-day shows each", highlight=False)
    _print_features(out, found, result)
    for fault in found.faults:
        out.print(f"[red]fault[/red] {fault}", soft_wrap=True)
    for giveaway in found.giveaways:
        out.print(f"[yellow]doubt[/yellow] {giveaway}", soft_wrap=True)
    out.print(f"{len(found.faults)} faults" if found.faults else "no faults")
    finish({"data": str(args.data), **result}, args.json)
    return 1 if found.faults else 0


def _headline(data: Path, found: Inspection, days: list[str]) -> str:
    requests = sum(t.requests for t in found.tallies.values())
    shown = sum(k * n for t in found.tallies.values() for k, n in t.candidates.items())
    size = sum(f.stat().st_size for f in data.glob("surface=*/**/*.parquet")) / 2**20
    span = f"{days[0]} to {days[-1]} ({len(days)} days)" if days else "no sound row"
    return (
        f"{data}: {span}, {requests:,} requests, {shown:,} impressions, {size:,.1f} MiB; "
        f"label delay {found.schema.label_delay_ms / 1000:g} s"
    )


def _print_days(out: Console, found: Inspection, result: dict[str, Any], by_day: bool) -> None:
    tasks = found.schema.tasks
    title = "candidates a request: mean and most; events of a history: 10th, 50th and 90th percentile"
    sizes = _table(title, "surface", "day", "requests", "shown", "candidates", "most", "history")
    rates = _table("mean of the observed labels", "surface", "day", *tasks)
    for surface, whole in result["surfaces"].items():
        for day, one in [*(whole["days"].items() if by_day else ()), ("all", whole)]:
            candidates, history = one["candidates"] or {}, one["history"] or {}
            sizes.add_row(
                surface,
                day,
                f"{one['requests']:,}",
                f"{one['impressions']:,}",
                _number(candidates.get("mean"), ".2f"),
                _number(candidates.get("max"), ".0f"),
                " ".join(_number(history.get(q), ".0f") for q in ("p10", "p50", "p90")),
                end_section=by_day and day == "all",
            )
            shown = [_number(one["label_rates"].get(t), ".4f") for t in tasks]
            rates.add_row(surface, day, *shown, end_section=by_day and day == "all")
    out.print(sizes)
    out.print(rates)


def _print_features(out: Console, found: Inspection, result: dict[str, Any]) -> None:
    of = result["surfaces"]
    coverage = _table("share of places with a value", "feature", "level", *of)
    ranges = _table("numbers, least to largest", "feature", *of, names=1)
    for feature in found.schema.features:
        shares = [_number(of[s]["coverage"].get(feature.name), ".1%") for s in of]
        coverage.add_row(feature.name, str(feature.level), *shares)
        if feature.kind is Kind.NUMERIC:
            bounds = [of[s]["ranges"].get(feature.name) for s in of]
            shown = [f"{b[0]:.3g} .. {b[1]:.3g}" if b else "-" for b in bounds]
            ranges.add_row(feature.name, *shown)
    out.print(coverage)
    out.print(ranges)


def _table(title: str, *columns: str, names: int = 2) -> Table:
    """The first columns are names, the others numbers."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i < names else "right", no_wrap=True)
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
