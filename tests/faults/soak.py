"""Hours of training compressed: `python -m tests.faults.soak --minutes 60`.

A tiny model is trained over a tiny log again and again, with checkpoints and records in MLflow as in any run: epochs,
checkpoints and sendings come hundreds of times faster than in earnest. Memory, file handles, threads and step time are
sampled; printed are their slopes by least squares after the first third, in which pools and caches fill. The status is
1 if handles or threads grow, or memory by more than `--most` MiB in a thousand steps.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import Report
from pipeline.config import CheckpointConfig
from pipeline.data.logs import Dataset
from pipeline.job import ConsoleReporter, member, start_tracker
from pipeline.train.trainer import Trainer
from tests.faults import work

WARM_UP = 1 / 3


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The process at one moment.

    Args:
        step: steps so far.
        seconds: since the start.
        memory_mib: resident, less what is mapped from files.
        handles: open files and sockets.
        threads: of the process.
        step_ms: median of the steps since the sample before.
    """

    step: int
    seconds: float
    memory_mib: float
    handles: int
    threads: int
    step_ms: float


def soak(folder: Path, minutes: float, every: int) -> list[Sample]:
    """Train for so many minutes; a sample after every so many steps."""
    os.environ |= {"TREFOIL_HOME": str(folder / "home"), "MLFLOW_TRACKING_URI": ""}
    tiny = work.recipe()
    config = replace(tiny, epochs=1_000_000, checkpoint=CheckpointConfig(steps=8, keep_newest=2), timeout_s=300.0)
    dataset = Dataset.open(work.log(folder / "log"))
    samples: list[Sample] = []
    with (
        member(config, folder / "run") as (ranks, supervision),
        start_tracker(config, dataset, folder / "run", ranks) as tracker,
    ):
        reporter = ConsoleReporter(Console(file=io.StringIO()), tracker)
        trainer = Trainer(config, dataset, ranks, folder / "run" / "checkpoints", reporter, supervision)
        _watch(trainer, samples, time.monotonic() + 60 * minutes, every)
        trainer.train()
    return samples


def _watch(trainer: Trainer, samples: list[Sample], end: float, every: int) -> None:
    steps, start, process = trainer._progress, time.monotonic(), psutil.Process()
    times: list[float] = []
    done = 0

    def watched(batches: Any) -> Iterator[Any]:
        nonlocal done
        began = time.perf_counter()
        for outputs in steps(batches):
            times.append(time.perf_counter() - began)
            yield outputs
            done += 1
            if done % every == 0:
                samples.append(
                    Sample(
                        step=done,
                        seconds=time.monotonic() - start,
                        memory_mib=_own_memory(process) / 2**20,
                        handles=process.num_fds(),
                        threads=process.num_threads(),
                        step_ms=1000 * float(np.median(times)),
                    )
                )
                times.clear()
                # What was printed is kept by nobody.
                console = trainer.reporter.console  # type: ignore[union-attr]
                console.file.seek(0)
                console.file.truncate()
            trainer.supervision.leaving = time.monotonic() > end
            began = time.perf_counter()

    trainer._progress = watched  # type: ignore[method-assign]


def _own_memory(process: psutil.Process) -> int:
    """Bytes that are the process's own; pages of files come and go as the system likes."""
    memory = process.memory_info()
    return int(memory.rss - memory.shared)


def slopes(samples: list[Sample]) -> dict[str, float]:
    """Change in a thousand steps, by least squares after the warm-up."""
    late = samples[int(len(samples) * WARM_UP) :]
    steps = np.array([s.step for s in late]) / 1000
    return {
        name: float(np.polyfit(steps, [getattr(s, name) for s in late], 1)[0])
        for name in ("memory_mib", "handles", "threads", "step_ms")
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--every", type=int, default=50, help="steps between two samples")
    parser.add_argument("--most", type=float, default=1.0, help="MiB that memory may grow in a thousand steps")
    parser.add_argument("--out", type=Path, help="file for all samples")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="trefoil-soak-") as folder:
        samples = soak(Path(folder), args.minutes, args.every)
    if len(samples) < 9:
        raise SystemExit(f"only {len(samples)} samples were taken; give more --minutes or a smaller --every")
    found = slopes(samples)
    late = samples[int(len(samples) * WARM_UP) :]
    table = Table("what", "first", "after warm-up", "last", "in 1,000 steps", title=f"soak of {samples[-1].step} steps")
    for name, slope in found.items():
        values = [getattr(s, name) for s in (samples[0], late[0], samples[-1])]
        table.add_row(name.replace("_", " "), *(f"{v:.1f}" for v in values), f"{slope:+.3f}")
    Console(width=120).print(table)
    if args.out:
        args.out.write_text(json.dumps([vars(s) for s in samples], indent=1))
    grown = {
        n: max(getattr(s, n) for s in late[-3:]) - max(getattr(s, n) for s in late[:3]) for n in ("handles", "threads")
    }
    figures = {"steps": samples[-1].step, "seconds": round(samples[-1].seconds), "in_1000_steps": found, "grown": grown}
    Report("soak", {"minutes": args.minutes, "every": args.every}).finish(figures)
    return 1 if found["memory_mib"] > args.most or any(v > 0 for v in grown.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
