"""Hours of training compressed: `python -m tests.faults.soak --minutes 60`.

A tiny model is trained over a tiny log again and again, with checkpoints and records in MLflow as in any run: epochs,
checkpoints and sendings come hundreds of times faster than in earnest. What the process holds is sampled, and a line
is laid through the samples after the first third, in which pools and caches fill. Printed are its slopes with 95 %
intervals. The status is 1 unless

- memory, handles and threads are shown not to grow: the upper end of the interval stays under what is allowed;
- the step is not shown to slow down: the lower end does.

Two kinds of memory tell a leak from a cache. `heap` is what the program has asked malloc for and not given back: a leak
raises it for ever. `resident` is what the system has given the process, with what malloc keeps for the next time: each
thread that allocates beside others gets an arena of its own (at most eight a core), and checkpoints and MLflow's
sendings run in threads, so it rises in steps until there are as many arenas as threads ever ran at once.
"""

from __future__ import annotations

import argparse
import ctypes
import io
import json
import os
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table
from scipy import stats

from benchmarks.common import Report
from pipeline.config import CheckpointConfig
from pipeline.data.logs import Dataset
from pipeline.job import ConsoleReporter, member, start_tracker
from pipeline.train.trainer import Trainer
from tests.faults import work

WARM_UP = 1 / 3
# Neighbouring samples are alike, so the line is laid through the means of so many stretches of them.
STRETCHES = 12
# More than half of the places in CPython's table of interned strings with all our modules loaded (2^19).
NAMES = 500_000
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The process at one moment.

    Args:
        step: steps so far.
        seconds: since the start.
        heap_mib: asked of malloc and not given back; 0 where malloc is not glibc's.
        resident_mib: resident, less what is mapped from files.
        handles: open files and sockets.
        threads: of the process.
        step_ms: median wall time of the steps since the sample before.
        processor_ms: processor time of all threads for each step since the sample before, which neighbours on the
            machine disturb less.
    """

    step: int
    seconds: float
    heap_mib: float
    resident_mib: float
    handles: int
    threads: int
    step_ms: float
    processor_ms: float


@dataclass(frozen=True, kw_only=True)
class Trend:
    """The change of a quantity in a thousand steps.

    Args:
        slope: by least squares.
        low, high: ends of its interval.
        allowed: how much it may change; None if it is only looked at.
        shown: whether it must be shown to stay below that (memory), or only not be shown to exceed it (time).
    """

    slope: float
    low: float
    high: float
    allowed: float | None
    shown: bool

    @property
    def grows(self) -> bool:
        return self.allowed is not None and (self.high if self.shown else self.low) > self.allowed


# No step for so long is a hang: a machine may be frozen for minutes while others measure.
TIMEOUT_S = 3600.0


def soak(folder: Path, minutes: float, every: int, out: Path) -> None:
    """Train for so many minutes; a sample after every so many steps goes to a file, as a line of JSON."""
    os.environ |= {"TREFOIL_HOME": str(folder / "home"), "MLFLOW_TRACKING_URI": ""}
    tiny = work.recipe()
    config = replace(tiny, epochs=1_000_000, checkpoint=CheckpointConfig(steps=8, keep_newest=2), timeout_s=TIMEOUT_S)
    dataset = Dataset.open(work.log(folder / "log"))
    with (
        member(config, folder / "run") as (ranks, supervision),
        start_tracker(config, dataset, folder / "run", ranks) as tracker,
    ):
        reporter = ConsoleReporter(Console(file=io.StringIO()), tracker)
        trainer = Trainer(config, dataset, ranks, folder / "run" / "checkpoints", reporter, supervision)
        _watch(trainer, out, time.monotonic() + 60 * minutes, every)
        trainer.train()


def _watch(trainer: Trainer, out: Path, end: float, every: int) -> None:
    steps, start, process = trainer.steps, time.monotonic(), psutil.Process()
    times: list[float] = []
    done, spent = 0, time.process_time()

    def watched(*args: Any, **kwargs: Any) -> Iterator[Any]:
        nonlocal done, spent
        began = time.perf_counter()
        for outputs in steps(*args, **kwargs):
            times.append(time.perf_counter() - began)
            yield outputs
            done += 1
            if done % every == 0:
                sample = Sample(
                    step=done,
                    seconds=time.monotonic() - start,
                    heap_mib=heap_bytes() / 2**20,
                    resident_mib=_own_memory(process) / 2**20,
                    handles=process.num_fds(),
                    threads=process.num_threads(),
                    step_ms=1000 * float(np.median(times)),
                    processor_ms=1000 * (time.process_time() - spent) / every,
                )
                with out.open("a") as file:
                    file.write(json.dumps(vars(sample)) + "\n")
                times.clear()
                spent = time.process_time()
                # What was printed is kept by nobody.
                console = trainer.reporter.console  # type: ignore[union-attr]
                console.file.seek(0)
                console.file.truncate()
            trainer.supervision.leaving |= time.monotonic() > end  # a SIGTERM ends it sooner, with its table
            began = time.perf_counter()

    trainer.steps = watched  # type: ignore[method-assign]


def _own_memory(process: psutil.Process) -> int:
    """Bytes that are the process's own; pages of files come and go as the system likes."""
    memory = process.memory_info()
    return int(memory.rss - memory.shared)


def grow_table_of_names() -> None:
    """Let CPython's table of interned strings take its lasting size.

    A string that is interned and let go uses up a place until the table is made anew, which for some 350,000 names
    doubles it, by 7.3 MiB: once, and on an ordinary run after three quarters of an hour.
    """
    for i in range(NAMES):
        sys.intern(f"a name that nothing keeps, {i}")


def heap_bytes() -> int:
    """Bytes in use over all arenas of glibc's malloc, and what it mapped; 0 with another malloc."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_info"):
        return 0
    libc.open_memstream.restype = ctypes.c_void_p
    text, size = ctypes.c_void_p(), ctypes.c_size_t()
    stream = ctypes.c_void_p(libc.open_memstream(ctypes.byref(text), ctypes.byref(size)))
    libc.malloc_info(0, stream)
    libc.fclose(stream)
    told = ctypes.string_at(text.value or 0, size.value)
    libc.free(text)
    root = ElementTree.fromstring(told)
    total = {str(e.get("type")): int(e.get("size") or 0) for e in root.findall("total")}
    system = next(int(e.get("size") or 0) for e in root.findall("system") if e.get("type") == "current")
    return system - total["fast"] - total["rest"] + total["mmap"]


def trends(samples: list[Sample]) -> dict[str, Trend]:
    """How each quantity changes after the warm-up."""
    late = samples[int(len(samples) * WARM_UP) :]
    span = (late[-1].step - late[0].step) / 1000
    allowed = {
        "heap_mib": (0.05, True),
        "resident_mib": (0.5, True),
        # One more in all that time.
        "handles": (1 / span, True),
        "threads": (1 / span, True),
        "processor_ms": (0.05 * float(np.mean([s.processor_ms for s in late])) / span, False),
        "step_ms": (None, False),
    }
    return {name: _trend(late, name, *limits) for name, limits in allowed.items()}


def _trend(samples: list[Sample], name: str, allowed: float | None, shown: bool) -> Trend:
    stretches = np.array_split(np.array([(s.step / 1000, getattr(s, name)) for s in samples]), STRETCHES)
    steps, values = np.array([part.mean(0) for part in stretches]).T
    line = stats.linregress(steps, values)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, STRETCHES - 2)) * float(line.stderr)
    slope = float(line.slope)
    return Trend(slope=slope, low=slope - half, high=slope + half, allowed=allowed, shown=shown)


def show(samples: list[Sample], found: dict[str, Trend]) -> None:
    """The table."""
    late = samples[int(len(samples) * WARM_UP) :]
    table = Table(title=f"soak of {samples[-1].step:,} steps, {samples[-1].seconds / 60:.0f} minutes")
    for heading in ("what", "first", "after warm-up", "last", "in 1,000 steps", "95 % interval", "allowed"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for name, trend in found.items():
        values = [getattr(s, name) for s in (samples[0], late[0], samples[-1])]
        interval = f"{trend.low:+.4f} to {trend.high:+.4f}"
        limit = "" if trend.allowed is None else f"{trend.allowed:.4f}"
        style = "red" if trend.grows else None
        row = (*(f"{v:.1f}" for v in values), f"{trend.slope:+.4f}", interval, limit)
        table.add_row(name.replace("_", " "), *row, style=style)
    Console(width=120).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--every", type=int, default=50, help="steps between two samples")
    parser.add_argument("--out", type=Path, help="file for all samples, a line of JSON each; anew")
    parser.add_argument("--read", type=Path, help="show such a file, of a soak that goes on or was cut short")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="trefoil-soak-") as folder:
        path = args.read or args.out or Path(folder) / "samples.jsonl"
        if args.read is None:
            path.unlink(missing_ok=True)
            grow_table_of_names()
            soak(Path(folder), args.minutes, args.every, path)
        samples = [Sample(**json.loads(line)) for line in path.read_text().splitlines()]
    if len(samples) < 3 * STRETCHES:
        raise SystemExit(f"only {len(samples)} samples were taken; give more --minutes or a smaller --every")
    found = trends(samples)
    show(samples, found)
    grown = [name for name, trend in found.items() if trend.grows]
    figures = {
        "steps": samples[-1].step,
        "seconds": round(samples[-1].seconds),
        "in_1000_steps": {name: [t.slope, t.low, t.high] for name, t in found.items()},
        "allowed": {name: t.allowed for name, t in found.items()},
        "grown": grown,
    }
    Report("soak", {"minutes": args.minutes, "every": args.every}).finish(figures)
    return 1 if grown else 0


if __name__ == "__main__":
    raise SystemExit(main())
