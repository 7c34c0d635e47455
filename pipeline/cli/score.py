"""trefoil score"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pipeline.cli.common import console, finish, parse
from pipeline.progress import Bar

DESCRIPTION = """Score rows with a surface's artifact: calibrated probabilities per task, in the order of the rows.

Rows are requests of the log's format, or flat: one row a candidate, with its request's features.

Example:  trefoil score --artifact models:/trefoil-hf@challenger --in rows.parquet --out scores.parquet"""


@dataclass(frozen=True, kw_only=True)
class Args:
    artifact: str
    """Folder of an artifact, or models:/NAME@ALIAS of the registry. One with compiled code (model.aoti.pt2) is code:
    score it only if you trust who made it."""
    input: Annotated[Path, tyro.conf.arg(name="in")]
    """Parquet file of rows."""
    out: Path
    """Parquet file to write."""
    raw: bool = False
    """Feature columns hold raw values, such as keys before hashing, not the log's ids."""
    delta: tuple[Path, ...] = ()
    """Deltas to apply first, in order, made by trefoil export --delta-from."""
    json: bool = False
    """Print the result as JSON."""
    quiet: bool = False
    """Print nothing but errors, and with --json the result."""


def main(argv: list[str]) -> int:
    args = parse(Args, argv, verb="score", description=DESCRIPTION)
    from pipeline import publish

    out = console(args)
    with Bar(out, "candidates") as bar:
        rows = publish.score_file(args.artifact, args.input, args.out, raw=args.raw, deltas=args.delta, progress=bar)
    out.print(f"wrote {args.out}: {rows:,} rows")
    return finish({"out": str(args.out), "rows": rows}, args.json)
