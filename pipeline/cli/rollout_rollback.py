"""trefoil rollout rollback"""

from __future__ import annotations

import time
from dataclasses import dataclass

import tyro

from pipeline.cli.common import console, finish, parse

DESCRIPTION = """Make a surface's previous version its champion again, in one move. Other surfaces are not touched.

Example:  trefoil rollout rollback sr --reason 'calibration of new ads'"""


@dataclass(frozen=True, kw_only=True)
class Args:
    surface: tyro.conf.Positional[str]
    """Which surface."""
    actor: str | None = None
    """Who rolls back; none given takes the user of this process."""
    reason: str = ""
    """In words, for the record."""
    json: bool = False
    """Print the result as JSON."""
    quiet: bool = False
    """Print nothing but errors, and with --json the result."""


def main(argv: list[str]) -> int:
    args = parse(Args, argv, verb="rollout rollback", description=DESCRIPTION)
    from pipeline.config import default_home
    from pipeline.rollout.registry import Registry

    registry = Registry(default_home())
    start = time.perf_counter()
    version = registry.rollback(args.surface, actor=args.actor, reason=args.reason)
    seconds = time.perf_counter() - start
    console(args).print(f"{args.surface}: version {version.version} is champion again ({seconds:.2f} s)")
    # Told only now: what serves comes first, its record in MLflow after.
    from pipeline.rollout.driver.publication import keep_change

    record = registry.history(args.surface)[-1]
    keep_change(record)
    return finish({"surface": args.surface, "aliases": record.after, "seconds": seconds}, args.json)
