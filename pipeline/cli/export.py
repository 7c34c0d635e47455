"""trefoil export"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.cli.common import console, finish, parse

DESCRIPTION = """Make one surface's serving artifact from a checkpoint, checked against the trainer on held-out rows.

Example:  trefoil export --checkpoint runs/RUN/checkpoints/epoch-1-step-00000000 --surface hf --out hf --data logs
          trefoil export --checkpoint NEWER --delta-from hf --out hf-delta --data logs"""


@dataclass(frozen=True, kw_only=True)
class Args:
    checkpoint: Path
    """Folder of the checkpoint."""
    out: Path
    """Folder of the artifact, or of the delta; must not exist."""
    surface: str | None = None
    """The surface to serve; a delta has that of its artifact."""
    delta_from: Path | None = None
    """Artifact of an older checkpoint: write only what has changed since, for scorers that run it."""
    data: Path | None = None
    """Log whose last day's rows the parity check scores; none given uses made-up rows."""
    dtype: Literal["int8", "int4", "fp16", "fp32"] = "int8"
    """Type of embedding rows in the artifact."""
    max_requests: int | None = None
    """Most requests in one run of the program; none given finds it by a sweep of latency and memory."""
    latency_ms: float = 50.0
    """The most time that the sweep allows one run."""
    memory_mb: float = 256.0
    """The most memory that the sweep allows one run."""
    compile: bool = False
    """Also compile with AOTInductor: faster scoring on the CPU; needs g++ and tens of seconds."""
    register: bool = False
    """Log it to MLflow and register it as challenger."""
    json: bool = False
    """Print the result as JSON."""
    quiet: bool = False
    """Print nothing but errors, and with --json the result."""


def main(argv: list[str]) -> int:
    args = parse(Args, argv, verb="export", description=DESCRIPTION)
    from pipeline import job, publish
    from pipeline.data.logs import Dataset
    from pipeline.errors import ConfigError
    from pipeline.serve.bound import Budget
    from pipeline.train.checkpoint import read_state

    out = console(args)
    dataset = Dataset.open(args.data) if args.data is not None else None
    if args.delta_from is not None:
        if args.register:
            raise ConfigError("a delta is no model and cannot be registered; leave out --register or --delta-from")
        delta = publish.export_delta_of(args.checkpoint, args.delta_from, args.out, dataset=dataset, console=out)
        return finish(delta, args.json)
    if args.surface is None:
        raise ConfigError("surface is not given; name the surface to export, or an artifact by --delta-from")
    result = publish.export_surface(
        args.checkpoint,
        args.surface,
        args.out,
        dataset=dataset,
        dtype=args.dtype,
        max_requests=args.max_requests,
        budget=Budget(latency_ms=args.latency_ms, memory_mb=args.memory_mb),
        compile=args.compile,
        console=out,
    )
    if args.register:
        experiment = job.experiment_of(read_state(args.checkpoint).config)
        # The record lies beside the artifact, whose content is sealed by its checksums.
        folder = args.out.parent / f".{args.out.name}.tracking"
        result |= publish.register_artifact(args.out, experiment=experiment, folder=folder, parent=None, console=out)
    return finish(result, args.json)
