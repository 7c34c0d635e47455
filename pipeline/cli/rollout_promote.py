"""trefoil rollout promote"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from pipeline.cli.common import console, finish, parse

DESCRIPTION = """Make a surface's challenger its champion; the champion becomes previous.

Refused without evidence that the gates passed it, on the log of the plan, against what serves now.

Example:  trefoil rollout promote hf --plan plan.yaml"""


@dataclass(frozen=True, kw_only=True)
class Args:
    surface: tyro.conf.Positional[str]
    """Whose challenger."""
    plan: Path | None = None
    """The plan whose log the evidence must come from; none given takes the log that the model was trained on."""
    actor: str | None = None
    """Who promotes; none given takes the user of this process."""
    reason: str = ""
    """In words, for the record."""
    json: bool = False
    """Print the result as JSON."""
    quiet: bool = False
    """Print nothing but errors, and with --json the result."""


def main(argv: list[str]) -> int:
    args = parse(Args, argv, verb="rollout promote", description=DESCRIPTION)
    from pipeline.config import default_home
    from pipeline.errors import ConfigError, unknown
    from pipeline.rollout.driver.publication import keep_change
    from pipeline.rollout.plan import read_plan
    from pipeline.rollout.registry import Registry

    plan = None if args.plan is None else read_plan(args.plan)
    if plan is not None and args.surface not in plan.surfaces:
        raise ConfigError(unknown("surface", args.surface, plan.surfaces))
    registry = Registry(default_home())
    version = registry.promote(
        args.surface, dataset=None if plan is None else plan.dataset, actor=args.actor, reason=args.reason
    )
    record = registry.history(args.surface)[-1]
    keep_change(record)
    evidence = record.evidence
    assert evidence is not None, "no promotion without"
    before = record.before.get("champion")
    console(args).print(
        f"{args.surface}: version {version.version} is champion"
        + (f", version {before} previous" if before is not None else "")
        + f"; evidence: MLflow run {evidence.run}"
    )
    return finish({"surface": args.surface, "aliases": record.after, "evidence": evidence.run}, args.json)
