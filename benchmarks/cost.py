"""How the cost of a training step grows: with tables, history, candidates, surfaces and batch.

    python -m benchmarks.cost [--quick] [--axes history batch ...]

One thread, processor time of whole steps on ready batches, medians. Each axis moves one thing and leaves the others at
128 requests of 16 candidates and 128 events, three surfaces, tables of 20,000 rows.

- `ms_per_1000_impressions`: by axis and value; `ms_per_1000_impressions_interval`: least and largest step, which hold
  the median of five with probability 1 - 2 / 2**5 = 94 %. How steady this machine is, not how other logs would do.
- `rows_per_table`: memory of a table grows with its rows, time only by what caches no longer hold.
- `surfaces`: the same rows in one, two or three towers: what serving more surfaces costs the others in training.

What it does not show: several ranks, GPUs, tables beyond this machine's memory.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from benchmarks import workload
from benchmarks.common import Report
from pipeline.config import RunConfig
from pipeline.data.logs import Dataset

AXES: dict[str, tuple[int, ...]] = {
    "rows_per_table": (20_000, 200_000, 2_000_000),
    "history": (32, 128, 512),
    "candidates": (4, 16, 64),
    "surfaces": (1, 2, 3),
    "batch": (32, 128, 512),
}
USUAL = {"rows_per_table": 20_000, "history": 128, "candidates": 16, "surfaces": 3, "batch": 128}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two values an axis, small batches; under a minute")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES), help="of the full form, which to run")
    asked = parser.parse_args()
    quick = asked.quick
    usual = USUAL | ({"batch": 32} if quick else {})
    steps = 2 if quick else 5
    figures: dict[str, Any] = {}
    intervals: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for axis in ("history", "candidates") if quick else asked.axes:
            chosen = AXES[axis][:2] if quick else AXES[axis]
            found = {value: cost(Path(folder), usual | {axis: value}, steps) for value in chosen}
            figures[axis] = {value: rounded(statistics.median(ms)) for value, ms in found.items()}
            intervals[axis] = {value: [rounded(min(ms)), rounded(max(ms))] for value, ms in found.items()}
            print({axis: figures[axis]}, flush=True)
    Report("cost", {"quick": quick, "steps": steps, "usual": usual}).finish(
        {"ms_per_1000_impressions": figures, "ms_per_1000_impressions_interval": intervals}
    )


def rounded(value: float) -> float:
    """Four digits, which are more than a clock is worth."""
    return float(f"{value:.4g}")


def cost(folder: Path, point: dict[str, int], steps: int) -> list[float]:
    """Milliseconds of processor time for 1,000 impressions, of each step."""
    with workload.trainer(run_of(point), log_of(folder, point), folder / "run" / "checkpoints") as trainer:
        batches = list(islice(trainer.loader.batches(0), 2))
        trained = trainer.steps(cycle(batches))
        for _ in range(2):
            next(trained)
        seconds = [_timed(trained) for _ in range(steps)]
        impressions = statistics.mean(b.labels.shape[0] for b in batches)
    return [1e6 * s / impressions for s in seconds]


def _timed(trained: Iterator[Any]) -> float:
    start = time.process_time()
    next(trained)
    return time.process_time() - start


def log_of(folder: Path, point: dict[str, int]) -> Dataset:
    """The log of a point, made once for all points that differ in batch or surfaces alone."""
    shape = {k: point[k] for k in ("rows_per_table", "history", "candidates")}
    root = folder / "-".join(map(str, shape.values()))
    if root.exists():
        return Dataset.open(root)
    return workload.log(
        root,
        requests=1024,
        candidates=shape["candidates"],
        history=shape["history"],
        items=shape["rows_per_table"],
    )


def run_of(point: dict[str, int]) -> RunConfig:
    run = workload.config(requests_per_batch=point["batch"])
    return replace(run, surfaces=run.surfaces[: point["surfaces"]])


if __name__ == "__main__":
    main()
