"""trefoil daily"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pipeline.cli.common import console, finish, parse
from pipeline.cli.launch import launch, recipe_of
from pipeline.config import RunConfig
from pipeline.errors import ConfigError

DESCRIPTION = """Train on every day of a log that the run has not seen, each scored per surface before it is trained on.

Call it again, with the same flags, when the log has more days. A day that is missing, late or changed is an error
until a flag names it.

Example:  trefoil daily --recipe demo --data logs --run-dir runs/live --optimizer.decay none"""


@dataclass(frozen=True, kw_only=True)
class Args:
    recipe: str
    """A shipped recipe (see `trefoil recipes`), or path/to/file.py:function."""
    data: Path
    """Folder of the log."""
    run_dir: Path
    """Folder of the run, the same every day."""
    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    skip: tuple[str, ...] = ()
    """Days that are missing, or not to be trained on."""
    late: tuple[str, ...] = ()
    """Days that came after a later one was trained on: train on them now, out of order."""
    again: tuple[str, ...] = ()
    """Days whose files have changed since they were trained on: train on them once more."""
    keep: tuple[str, ...] = ()
    """Days whose files have changed since they were trained on: leave them as they were learned."""
    nproc: int = 1
    """Processes on this machine; under torchrun or TorchX leave it out."""
    max_restarts: int = 0
    """With --nproc: times that all processes start again, from their last checkpoint, after one has failed."""
    warm_start: Path | None = None
    """Checkpoint of another recipe or log to start the first day from."""
    fresh: tuple[str, ...] = ()
    """With --warm-start: tables or parameters (names or patterns) that start anew although the checkpoint has them."""
    json: bool = False
    """Print the result as JSON."""
    quiet: bool = False
    """Print nothing but errors, and with --json the result."""


def main(argv: list[str]) -> int:
    recipe, data, config = recipe_of(argv)
    default = Args(recipe=recipe, data=data, run_dir=Path("runs/live"), config=config)
    args = parse(Args, argv, verb="daily", description=DESCRIPTION, default=default)
    from pipeline import job  # here, because it brings torch
    from pipeline.daily import run_days
    from pipeline.train.days import DayChoices

    if args.nproc < 1:
        raise ConfigError(f"--nproc is {args.nproc}; it must be at least 1")
    if not job.is_worker() and args.nproc > 1:
        return launch("daily", argv, args.nproc, args.max_restarts, args.run_dir)
    out = console(args)
    choices = DayChoices(skip=args.skip, late=args.late, again=args.again, keep=args.keep)
    result = run_days(
        args.config,
        args.data,
        args.run_dir,
        console=out,
        choices=choices,
        warm=args.warm_start,
        fresh=args.fresh,
    )
    if not job.is_first():
        return 0
    if result.stopped:
        out.print("told to leave: saved; the same command goes on")
    out.print(
        f"\nrun {result.folder}\ndays trained on: {', '.join(result.days) or 'none'}\ncheckpoint {result.checkpoint}"
    )
    return finish(
        {
            "run": str(result.folder),
            "days": list(result.days),
            "checkpoint": str(result.checkpoint) if result.checkpoint is not None else None,
            "stopped": result.stopped,
            "scores": result.scores,
        },
        args.json,
    )
