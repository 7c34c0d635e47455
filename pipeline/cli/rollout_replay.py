"""trefoil rollout replay"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.cli.common import console, finish, parse

DESCRIPTION = """Replay the plan's later days: candidate and control score them side by side; harm is taken back.

A challenger is watched beside the champion and withdrawn where it does harm; without one, the champion is watched
beside the version before it and rolled back. A fault can be planted in the candidate's requests, to see it found.

Example:  trefoil rollout replay --plan plan.yaml --data logs --fault hf:scores*2.5"""


@dataclass(frozen=True, kw_only=True)
class Args:
    plan: Path
    """The plan."""
    data: Path
    """Folder of the log."""
    surfaces: tuple[str, ...] = ()
    """Surfaces to replay; none given replays all that have two versions."""
    fault: str | None = None
    """SURFACE:FEATURE loses a numeric feature, SURFACE:FEATURE*FACTOR changes its units, for the candidate alone;
    SURFACE:scores*FACTOR distorts its probabilities."""
    out: Path | None = None
    """Folder of the rollout; none given takes TREFOIL_HOME/rollout."""
    resamples: int = 500
    """Resamples of users behind each interval."""
    json: bool = False
    """Print the result as JSON."""
    quiet: bool = False
    """Print nothing but errors, and with --json the result."""


def main(argv: list[str]) -> int:
    args = parse(Args, argv, verb="rollout replay", description=DESCRIPTION)
    from pipeline.config import default_home
    from pipeline.errors import ConfigError, unknown
    from pipeline.rollout.driver.context import open_context
    from pipeline.rollout.driver.replay import REPLAY_RESULT, replay, tell_replay
    from pipeline.rollout.faults import parse_fault
    from pipeline.rollout.plan import read_plan
    from pipeline.rollout.registry import CHALLENGER, PREVIOUS, Registry

    out = console(args)
    plan = read_plan(args.plan)
    folder = args.out or default_home() / "rollout"
    context = open_context(plan, 0, args.data, folder, resamples=args.resamples, console=out)
    for surface in args.surfaces:
        if surface not in plan.surfaces:
            raise ConfigError("--surfaces: " + unknown("surface", surface, plan.surfaces))
    fault = None if args.fault is None else parse_fault(args.fault, context.dataset.schema)
    aliases = {s: Registry(default_home()).aliases(s) for s in args.surfaces or tuple(plan.surfaces)}
    surfaces = args.surfaces or tuple(s for s, a in aliases.items() if CHALLENGER in a or PREVIOUS in a)
    results = {}
    for surface in surfaces:
        planted = fault if fault is not None and fault.surface == surface else None
        results[surface] = replay(context, surface, fault=planted)
        tell_replay(results[surface], out)
    if not surfaces:
        out.print("no surface has two versions to compare; promote a challenger first")
    return finish({s: REPLAY_RESULT.dump_python(r, mode="json") for s, r in results.items()}, args.json)
