"""trefoil compare"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from pipeline.cli.common import console, finish, parse
from pipeline.errors import ConfigError

DESCRIPTION = """Differences between runs on the same rows, paired over users; the first run is the reference.

Runs of single surfaces are put together with a plus, to stand against a unified run.

Example:  trefoil compare runs/unified runs/merged runs/only_hf+runs/only_sr+runs/only_rp"""


@dataclass(frozen=True, kw_only=True)
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]]
    """Folders of runs; FOLDER+FOLDER puts runs of different surfaces together."""
    split: Literal["test", "val"] = "test"
    """Which predictions to compare."""
    resamples: int = 1000
    """Resamples of users behind each interval."""
    json: bool = False
    """Print the result as JSON."""
    quiet: bool = False
    """Print nothing but errors, and with --json the result."""


def main(argv: list[str]) -> int:
    args = parse(Args, argv, verb="compare", description=DESCRIPTION)
    from pipeline.evaluate.compare import compare
    from pipeline.evaluate.predictions import Predictions, read_predictions
    from pipeline.evaluate.report import as_dict, print_report

    if not args.runs:
        raise ConfigError("give at least one run, such as `trefoil compare runs/A runs/B`")
    runs = {}
    for text in args.runs:
        folders = [Path(part) for part in text.split("+")]
        parts = [read_predictions(folder / "predictions" / f"{args.split}.parquet") for folder in folders]
        name = "+".join(folder.name for folder in folders)
        if name in runs:
            raise ConfigError(f"run {name!r} is given twice; give different folders")
        runs[name] = Predictions.concat(parts)
    out = console(args)
    with out.status(f"drawing users anew {args.resamples} times for the intervals"):
        comparison = compare(runs, resamples=args.resamples)
    print_report(comparison, console=out)
    return finish(as_dict(comparison), args.json)
