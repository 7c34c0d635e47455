"""trefoil unshard"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.cli.common import console, finish, parse

DESCRIPTION = """Write a checkpoint's weights to one file of plain tensors, with a JSON of what they are beside it.

`trefoil evaluate` and `trefoil export` take the file in place of a checkpoint's folder.

Example:  trefoil unshard --checkpoint runs/RUN/checkpoints/epoch-1-step-00000000 --out model.safetensors"""


@dataclass(frozen=True, kw_only=True)
class Args:
    checkpoint: Path
    """Folder of the checkpoint."""
    out: Path
    """The file to write, NAME.safetensors; NAME.json goes beside it. Neither may exist."""
    json: bool = False
    """Print the result as JSON."""
    quiet: bool = False
    """Print nothing but errors, and with --json the result."""


def main(argv: list[str]) -> int:
    args = parse(Args, argv, verb="unshard", description=DESCRIPTION)
    from pipeline.train.checkpoint import unshard

    path = unshard(args.checkpoint, args.out)
    size = path.stat().st_size
    console(args).print(f"wrote {path} ({size / 1e6:.1f} MB) and {path.with_suffix('.json').name}")
    return finish({"file": str(path), "description": str(path.with_suffix(".json")), "bytes": size}, args.json)
