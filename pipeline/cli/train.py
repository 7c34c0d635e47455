"""trefoil train"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import tyro

from pipeline.cli.common import console, finish, parse
from pipeline.cli.launch import launch, recipe_of
from pipeline.config import RunConfig, default_home
from pipeline.errors import ConfigError

DESCRIPTION = """Train a recipe, then score its validation and test days per surface and task.

Every field of the recipe is a flag. With --run-dir and the same flags, a run that was cut off goes on from its
last checkpoint. Recipes given as FILE.py:FUNCTION are code and run as such.

Example:  trefoil train --recipe demo --data logs --nproc 2 --epochs 1 --model.history.layers 2"""


@dataclass(frozen=True, kw_only=True)
class Args:
    recipe: str
    """A shipped recipe (see `trefoil recipes`), path/to/file.py:function, or a run's config.json."""
    data: Path
    """Folder of the log."""
    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    nproc: int = 1
    """Processes on this machine; under torchrun or TorchX leave it out."""
    max_restarts: int = 0
    """With --nproc: times that all processes start again, from their last checkpoint, after one has failed."""
    run_dir: Path | None = None
    """Folder of the run; one that holds checkpoints is gone on with. None given makes a new one."""
    warm_start: Path | None = None
    """Checkpoint of another recipe or log to take weights from; tables that got more ids keep their rows."""
    fresh: tuple[str, ...] = ()
    """With --warm-start: tables or parameters (names or patterns) that start anew although the checkpoint has them."""
    tags: dict[str, str] = field(default_factory=dict)
    """Tags of the run in MLflow, such as wave 1."""
    parent: str | None = None
    """Key of the run in MLflow that this one is part of; sweeps and waves give it."""
    profile_steps: tuple[int, int] | None = None
    """First and last step to write a profiler's trace of, such as 10 12, counted from the start of this process; it
    lies in the run's traces/ and opens in chrome://tracing or ui.perfetto.dev."""
    register: bool = False
    """Export every surface afterwards and register it as challenger."""
    latency_ms: float = 50.0
    """With --register: what one run of an exported program may take here, as for `trefoil export`."""
    memory_mb: float = 256.0
    """With --register: the most memory that one may take."""
    json: bool = False
    """Print the result as JSON."""
    quiet: bool = False
    """Print nothing but errors, and with --json the result."""


def main(argv: list[str]) -> int:
    recipe, data, config = recipe_of(argv)
    default = Args(recipe=recipe, data=data, config=config)
    args = parse(Args, argv, verb="train", description=DESCRIPTION, default=default)
    from pipeline import job  # here, because it brings torch
    from pipeline.serve.bound import Budget

    if args.nproc < 1:
        raise ConfigError(f"--nproc is {args.nproc}; it must be at least 1")
    if args.run_dir is None and job.is_worker():
        raise ConfigError("give --run-dir: ranks that a launcher starts must agree on the folder of the run")
    if args.profile_steps is not None and not 2 <= args.profile_steps[0] <= args.profile_steps[1]:
        raise ConfigError(f"--profile-steps is {args.profile_steps}; give the first step, 2 or later, and the last")
    folder = args.run_dir or _new_folder(args.config)
    if not job.is_worker() and args.nproc > 1:
        return launch("train", argv, args.nproc, args.max_restarts, folder)
    out = console(args)
    if args.fresh and args.warm_start is None:
        raise ConfigError("--fresh is given without --warm-start, which it is about")
    result = job.run(
        args.config,
        args.data,
        folder,
        console=out,
        warm=args.warm_start,
        fresh=args.fresh,
        profile_steps=args.profile_steps,
        tags=args.tags,
        parent=args.parent,
    )
    if not job.is_first():
        return 0
    summary = job.summary(result)
    if result.stopped:
        out.print(f"\ntold to leave: saved {result.checkpoint}; the same command with --run-dir {folder} goes on")
        return finish(summary, args.json)
    if args.register:
        summary["registered"] = job.register(
            result, args.data, console=out, budget=Budget(latency_ms=args.latency_ms, memory_mb=args.memory_mb)
        )
    out.print(f"\nrun {result.folder}\ncheckpoint {result.checkpoint}")
    return finish(summary, args.json)


def _new_folder(config: RunConfig) -> Path:
    return default_home() / f"{config.name}-{datetime.now(UTC):%Y%m%dT%H%M%S}-seed{config.seed}"
