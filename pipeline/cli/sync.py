"""trefoil sync"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from pipeline.cli.common import console, finish, parse
from pipeline.errors import TrefoilError

DESCRIPTION = """Send MLflow what runs could not send, because it was down or slow.

Example:  trefoil sync runs/RUN"""


@dataclass(frozen=True, kw_only=True)
class Args:
    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR...")]
    """Folders of runs, or their tracking/ folders."""
    uri: str | None = None
    """Address of MLflow; none given takes MLFLOW_TRACKING_URI, else the run's own."""
    json: bool = False
    """Print the result as JSON."""
    quiet: bool = False
    """Print nothing but errors, and with --json the result."""


def main(argv: list[str]) -> int:
    args = parse(Args, argv, verb="sync", description=DESCRIPTION)
    from pipeline.tracking.sender import sync

    out = console(args)
    found: dict[str, object] = {}
    failed = 0
    for folder in args.runs:
        try:
            sent = sync(folder, uri=args.uri)
        except TrefoilError as error:
            failed = 1
            found[folder] = {"error": str(error)}
            print(f"trefoil sync: {folder}: {error}", file=sys.stderr)
        else:
            found[folder] = {"sent": sent.entries, "rejected": sent.rejected, "run_id": sent.run_id}
            out.print(f"{folder}: {sent.entries} entries sent, {sent.rejected} rejected, run {sent.run_id}")
    finish(found, args.json)
    return failed
