"""trefoil rollout run"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.cli.common import console, finish, parse

DESCRIPTION = """Train a wave step by step, measure it, let the gates decide; what passes becomes challenger.

Wave 0 is the separate models. A wave that was cut off goes on; one that has ended is shown again.

Example:  trefoil rollout run --plan plan.yaml --data logs --wave 1"""


@dataclass(frozen=True, kw_only=True)
class Args:
    plan: Path
    """The plan."""
    data: Path
    """Folder of the log that it was made for."""
    wave: int
    """Number of the wave; 0 for the separate models."""
    out: Path | None = None
    """Folder of the rollout; none given takes TREFOIL_HOME/rollout."""
    promote: bool = False
    """Promote what passed at once, without a person who reads the report first."""
    resamples: int = 500
    """Resamples of users behind each interval."""
    json: bool = False
    """Print the result as JSON."""
    quiet: bool = False
    """Print nothing but errors, and with --json the result."""


def main(argv: list[str]) -> int:
    args = parse(Args, argv, verb="rollout run", description=DESCRIPTION)
    from pipeline.config import default_home
    from pipeline.rollout.driver.context import REPORT, open_context
    from pipeline.rollout.driver.publication import keep_change
    from pipeline.rollout.driver.wave import run_wave
    from pipeline.rollout.gates import DECISION
    from pipeline.rollout.plan import read_plan
    from pipeline.rollout.registry import CHALLENGER, Registry

    out = console(args)
    folder = args.out or default_home() / "rollout"
    context = open_context(read_plan(args.plan), args.wave, args.data, folder, resamples=args.resamples, console=out)
    result = run_wave(context)
    registry = Registry(default_home())
    promoted = {}
    for surface, version in result.versions.items() if args.promote else ():
        if registry.aliases(surface).get(CHALLENGER) == version:
            promoted[surface] = registry.promote(surface, dataset=context.plan.dataset).version
            keep_change(registry.history(surface)[-1])
            out.print(f"  {surface}: version {version} is champion")
    return finish(
        {
            "wave": result.wave,
            "report": str(context.folder / REPORT),
            "run": result.run,
            "steps": [{"step": r.step, "kept": r.kept, "reason": r.reason} for r in result.rungs],
            "decisions": {s: DECISION.dump_python(d, mode="json") for s, d in result.decisions.items()},
            "versions": result.versions,
            "promoted": promoted,
        },
        args.json,
    )
