"""trefoil evaluate"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.cli.common import console, finish, parse

DESCRIPTION = """Score days of a log with a checkpoint and judge them per surface and task, with intervals over users.

Example:  trefoil evaluate --checkpoint runs/RUN/checkpoints/epoch-1-step-00000000 --data logs"""


@dataclass(frozen=True, kw_only=True)
class Args:
    checkpoint: Path
    """Folder of the checkpoint."""
    data: Path
    """Folder of the log."""
    days: tuple[str, ...] = ()
    """Days to score; none given scores the run's test days."""
    out: Path | None = None
    """File for the predictions (Parquet); none given keeps none."""
    resamples: int = 200
    """Resamples of users behind each interval."""
    json: bool = False
    """Print the result as JSON."""
    quiet: bool = False
    """Print nothing but errors, and with --json the result."""


def main(argv: list[str]) -> int:
    args = parse(Args, argv, verb="evaluate", description=DESCRIPTION)
    from pipeline.data.logs import Dataset
    from pipeline.evaluate.predictions import write_predictions
    from pipeline.evaluate.report import as_dict, print_report
    from pipeline.progress import Bar
    from pipeline.train.checkpoint import read_state
    from pipeline.train.days import split_days
    from pipeline.train.judge import judge, score_days

    out = console(args)
    state = read_state(args.checkpoint)
    dataset = Dataset.open(args.data)
    days = args.days or split_days(dataset, state.config.days).test
    with Bar(out, "batches") as bar:
        predictions = score_days(args.checkpoint, dataset, days, bar)
    if args.out is not None:
        write_predictions(args.out, predictions)
    with out.status(f"drawing users anew {args.resamples} times for the intervals"):
        comparison = judge(predictions, dataset, state.training_days, resamples=args.resamples)
    print_report(comparison, console=out)
    return finish({"days": days, **as_dict(comparison)}, args.json)
