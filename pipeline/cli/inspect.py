"""trefoil inspect"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from pipeline.cli.common import console, finish, parse
from pipeline.data.inspect import Inspection, inspect
from pipeline.schema import Kind

DESCRIPTION = """What a log holds, per surface and day, and everything that is wrong with it (then the status is 1).

Example:  trefoil inspect logs"""


@dataclass(frozen=True, kw_only=True)
class Args:
    data: Annotated[Path, tyro.conf.Positional]
    """Folder of a log."""
    json: bool = False
    """Print the result as JSON."""


def main(argv: list[str]) -> int:
    args = parse(Args, argv, verb="inspect", description=DESCRIPTION)
    out = console(args.json)
    with out.status(f"reading {args.data}"):
        found = inspect(args.data)
    result = found.as_dict()
    _print_days(out, found, result)
    _print_features(out, found, result)
    for fault in found.faults:
        out.print(f"[red]fault[/red] {fault}", soft_wrap=True)
    out.print(f"{len(found.faults)} faults" if found.faults else "no faults")
    finish({"data": str(args.data), **result}, args.json)
    return 1 if found.faults else 0


def _print_days(out: Console, found: Inspection, result: dict[str, Any]) -> None:
    tasks = found.schema.tasks
    sizes = _table("", "surface", "day", "requests", "impressions", "cand. mean", "max", "history p10", "p50", "p90")
    rates = _table("mean of the observed labels", "surface", "day", *tasks)
    for surface, whole in result["surfaces"].items():
        for day, one in [*whole["days"].items(), ("all", whole)]:
            candidates, history = one["candidates"] or {}, one["history"] or {}
            sizes.add_row(
                surface,
                day,
                f"{one['requests']:,}",
                f"{one['impressions']:,}",
                _number(candidates.get("mean"), ".2f"),
                _number(candidates.get("max"), ".0f"),
                *(_number(history.get(q), ".0f") for q in ("p10", "p50", "p90")),
                end_section=day == "all",
            )
            shown = [_number(one["label_rates"].get(t), ".4f") for t in tasks]
            rates.add_row(surface, day, *shown, end_section=day == "all")
    out.print(sizes)
    out.print(rates)


def _print_features(out: Console, found: Inspection, result: dict[str, Any]) -> None:
    of = result["surfaces"]
    coverage = _table("share of places with a value", "feature", "level", *of)
    ranges = _table("numbers, least to largest", "feature", "level", *of)
    for feature in found.schema.features:
        shares = [_number(of[s]["coverage"].get(feature.name), ".1%") for s in of]
        coverage.add_row(feature.name, str(feature.level), *shares)
        if feature.kind is Kind.NUMERIC:
            bounds = [of[s]["ranges"].get(feature.name) for s in of]
            shown = [f"{b[0]:.4g} .. {b[1]:.4g}" if b else "-" for b in bounds]
            ranges.add_row(feature.name, str(feature.level), *shown)
    out.print(coverage)
    out.print(ranges)


def _table(title: str, *columns: str) -> Table:
    """The first two columns are names, the others numbers."""
    table = Table(title=title or None)
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i < 2 else "right", no_wrap=i < 2)
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
