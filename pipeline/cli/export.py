"""trefoil export"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.cli.common import console, finish, parse

DESCRIPTION = """Make one surface's serving artifact from a checkpoint, checked against the trainer on held-out rows.

Example:  trefoil export --checkpoint runs/RUN/checkpoints/epoch-1-step-00000000 --surface hf --out hf --data logs"""


@dataclass(frozen=True, kw_only=True)
class Args:
    checkpoint: Path
    """Folder of the checkpoint."""
    surface: str
    """The surface to serve."""
    out: Path
    """Folder of the artifact; must not exist."""
    data: Path | None = None
    """Log whose last day's rows the parity check scores; none given uses made-up rows."""
    dtype: Literal["int8", "int4", "fp16", "fp32"] = "int8"
    """Type of embedding rows in the artifact."""
    register: bool = False
    """Log it to MLflow and register it as challenger."""
    json: bool = False
    """Print the result as JSON."""


def main(argv: list[str]) -> int:
    args = parse(Args, argv, verb="export", description=DESCRIPTION)
    from pipeline import job, publish
    from pipeline.data.logs import Dataset
    from pipeline.train.checkpoint import read_state

    out = console(args.json)
    dataset = Dataset.open(args.data) if args.data is not None else None
    result = publish.export_surface(
        args.checkpoint, args.surface, args.out, dataset=dataset, dtype=args.dtype, console=out
    )
    if args.register:
        experiment = job.experiment_of(read_state(args.checkpoint).config)
        # The record lies beside the artifact, whose content is sealed by its checksums.
        folder = args.out.parent / f".{args.out.name}.tracking"
        result |= publish.register_artifact(args.out, experiment=experiment, folder=folder, parent=None, console=out)
    return finish(result, args.json)
