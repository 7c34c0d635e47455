"""trefoil rollout status"""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from pipeline.cli.common import console, finish, parse

DESCRIPTION = """Which version of each surface serves (champion), waits (challenger) and served before (previous).

What a process that died has left half made is finished or undone first, and said.

Example:  trefoil rollout status"""


@dataclass(frozen=True, kw_only=True)
class Args:
    json: bool = False
    """Print the result as JSON."""
    quiet: bool = False
    """Print nothing but errors, and with --json the result."""


def main(argv: list[str]) -> int:
    args = parse(Args, argv, verb="rollout status", description=DESCRIPTION)
    from pipeline.config import default_home
    from pipeline.rollout.registry import ALIASES, Registry

    out = console(args)
    registry = Registry(default_home())
    surfaces = registry.surfaces()
    recovered = {s: record for s in surfaces if (record := registry.recover(s)) is not None}
    for surface, record in recovered.items():
        out.print(f"{surface}: the {record.action} that {record.actor} began at {record.time} was {record.outcome}")
    aliases = {s: registry.aliases(s) for s in surfaces}
    last = {s: next(reversed(registry.history(s)), None) for s in surfaces}
    table = Table(box=None)
    for heading in ("surface", *reversed(ALIASES), "last change"):
        table.add_column(heading)
    for surface in surfaces:
        record = last[surface]
        change = "" if record is None else f"{record.action} by {record.actor}, {record.time[:19]}Z"
        table.add_row(surface, *(str(aliases[surface].get(a, "-")) for a in reversed(ALIASES)), change)
    if surfaces:
        out.print(table)
    else:
        out.print("no model is registered yet; `trefoil rollout run` does so")
    return finish(
        {"aliases": aliases, "recovered": {s: r.outcome for s, r in recovered.items()}},
        args.json,
    )
