"""trefoil rollout history"""

from __future__ import annotations

import json
from dataclasses import dataclass

import tyro

from pipeline.cli.common import console, finish, parse

DESCRIPTION = """Who changed what a surface serves, when, and on which evidence; newest last.

Example:  trefoil rollout history hf"""


@dataclass(frozen=True, kw_only=True)
class Args:
    surfaces: tyro.conf.Positional[tuple[str, ...]] = ()
    """Which surfaces; none given shows all."""
    json: bool = False
    """Print the result as JSON."""
    quiet: bool = False
    """Print nothing but errors, and with --json the result."""


def main(argv: list[str]) -> int:
    args = parse(Args, argv, verb="rollout history", description=DESCRIPTION)
    from pipeline.config import default_home
    from pipeline.errors import RegistryError, unknown
    from pipeline.rollout import audit
    from pipeline.rollout.registry import Registry

    out = console(args)
    registry = Registry(default_home())
    known = registry.surfaces()
    for surface in args.surfaces:
        if surface not in known:
            raise RegistryError(unknown("surface", surface, known))
    history = {s: registry.history(s) for s in args.surfaces or known}
    for surface, records in history.items():
        out.print(surface, style="bold")
        for r in records:
            after = ", ".join(f"{alias} {number}" for alias, number in r.after.items()) or "nothing"
            evidence = f"; evidence: run {r.evidence.run}" if r.evidence else ""
            reason = f"; {r.reason}" if r.reason else ""
            outcome = "" if r.outcome == "done" else f" ({r.outcome})"
            out.print(
                f"  {r.time[:19]}Z  {r.action:8} by {r.actor}{outcome}: {after}{evidence}{reason}", soft_wrap=True
            )
    return finish({s: [json.loads(audit.dump(r)) for r in records] for s, records in history.items()}, args.json)
