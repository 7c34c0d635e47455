"""Training on a GPU: what broadcasting, precision, overlap and places of tables are worth there.

    python -m benchmarks.gpu [--quick] [--rows 32768] [--parts speed loader broadcast precision places plan]

Wall time of whole training steps between two waits for the device, after steps to warm up; medians over rounds in
which the sides take turns. Batches are ready on the host before the clock starts, and are copied to the device within
it; `loader` alone reads the log while it trains. The model is `benchmarks.workload`'s.

- `speed`: milliseconds of a step and impressions a second by requests a batch, and the step's parts by its own clock.
- `loader`: impressions a second with the loader in the loop, and the share of the time that the step waits for it.
- `broadcast`: plain expanded rows (`benchmarks.plain`) over broadcast requests: `train_speedup_cC_hH` of a step, and
  `memory_ratio_cC_hH` of the most memory that tensors took in a step beyond what lies there between steps.
- `precision`: a step's time and memory in float32, with TF32 products (the default, and of all that follow), without
  deterministic algorithms, under bfloat16 autocast, compiled, without overlap, in micro-batches.
- `places`: a large table in the device's memory, in the host's with a cache on the device, in the host's alone: time of
  a step and memory on the device.
- `plan`: bytes that TorchRec's planner expects on the device and the embedding part's time, beside what is measured.

What it does not show: several GPUs, NCCL between them, logs of production size. Without a GPU it runs on CPU, where
only its form can be judged, and leaves memory out.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from benchmarks import workload
from benchmarks.common import Report, median_ratio
from benchmarks.plain import expanded
from pipeline.config import ComputeConfig, RunConfig, ShardingConfig
from pipeline.data.batch import Batch
from pipeline.data.logs import Dataset
from pipeline.schema import Level
from pipeline.train.cluster import Cluster, Workload
from pipeline.train.planner import GPUS
from pipeline.train.trainer import Trainer

PARTS = ("speed", "loader", "broadcast", "precision", "places", "plan")
CANDIDATES, HISTORY = 16, 128
WARMUP = 5


def on_gpu() -> bool:
    return torch.cuda.is_available()


def settled() -> float:
    """Seconds, once the device has nothing left to do."""
    if on_gpu():
        torch.cuda.synchronize()
    return time.perf_counter()


def step_seconds(steps: Iterator[Any], count: int) -> float:
    """Mean seconds of the next steps."""
    start = settled()
    for _ in islice(steps, count):
        pass
    return (settled() - start) / count


def working_bytes(steps: Iterator[Any]) -> int:
    """The most bytes that tensors take within a step, beyond what lies there before it; 0 without a GPU."""
    if not on_gpu():
        return 0
    settled()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    next(steps)
    settled()
    return int(torch.cuda.max_memory_allocated()) - held


@contextmanager
def made(run: RunConfig, log: Dataset) -> Iterator[Trainer]:
    with tempfile.TemporaryDirectory() as folder, workload.trainer(run, log, Path(folder) / "checkpoints") as trainer:
        yield trainer


def timed(run: RunConfig, log: Dataset, *, steps: int, rounds: int, batches: int = 4) -> dict[str, Any]:
    """Milliseconds of a step (median of rounds), impressions a second, and its parts' shares."""
    with made(run, log) as trainer:
        ready = list(islice(trainer.loader.batches(0), batches))
        going = trainer.step.over(cycle(ready))
        step_seconds(going, WARMUP)
        trainer.clock.read()
        seconds = statistics.median(step_seconds(going, steps) for _ in range(rounds))
        parts = trainer.clock.read()
        rows = statistics.mean(sum(b.inputs.candidates_per_surface) for b in ready)
        return {
            "step_ms": 1e3 * seconds,
            "impressions_per_second": rows / seconds,
            "parts": {k: v / sum(parts.values()) for k, v in parts.items()},
            "working_mb": working_bytes(going) / 2**20,
        }


def speed(log: Dataset, quick: bool) -> dict[str, Any]:
    sizes = (32, 64) if quick else (128, 512, 2048, 4096)
    return {f"b{n}": timed(workload.config(requests_per_batch=n), log, **effort(quick)) for n in sizes}


def effort(quick: bool) -> dict[str, int]:
    return {"steps": 2, "rounds": 1} if quick else {"steps": 20, "rounds": 5}


def loader(log: Dataset, quick: bool) -> dict[str, Any]:
    size = 32 if quick else 512
    with made(workload.config(requests_per_batch=size), log) as trainer:

        def epochs() -> Iterator[Batch]:
            for epoch in range(10_000):
                yield from trainer.loader.batches(epoch)

        steps = trainer.steps(epochs())
        step_seconds(steps, WARMUP)
        waited, start, rows = trainer.loader.waited_s, settled(), 0
        for outputs in islice(steps, 4 if quick else 60):
            rows += sum(outputs.batch.inputs.candidates_per_surface)
        seconds = settled() - start
        return {
            "requests_per_batch": size,
            "impressions_per_second": rows / seconds,
            "wait_share": (trainer.loader.waited_s - waited) / seconds,
        }


def broadcast(folder: Path, quick: bool, rows: int) -> dict[str, Any]:
    cells = [(1, 32), (4, 32)] if quick else [(1, 128), (4, 128), (16, 128), (64, 128), (16, 512)]
    figures: dict[str, Any] = {}
    for candidates, history in cells:
        # Fewer of long histories, so that the plain form fits too.
        requests = 16 if quick else rows * HISTORY // (history * candidates)
        at = folder / f"c{candidates}h{history}"
        found = attempt(lambda at=at, r=requests, c=candidates, h=history: cell(at, r, c, h, quick))  # type: ignore[misc]
        figures |= {f"{name}_c{candidates}_h{history}": value for name, value in found.items()}
        tell(at.name, found)
    return figures


def cell(at: Path, requests: int, candidates: int, history: int, quick: bool) -> dict[str, Any]:
    """Broadcast requests and plain rows in turn, on one batch."""
    log = workload.log(at, requests=2 * requests, candidates=candidates, history=history)
    run = workload.config(requests_per_batch=requests, sharding=ShardingConfig(pipeline=False))
    with made(run, log) as trainer:
        grouped = next(iter(trainer.loader.batches(0)))
        plain = expanded(
            grouped,
            candidate_keys={f.name for f in log.schema.select(level=Level.CANDIDATE)},
            history_key=trainer.plan.layout.history_sequences[0],
        )
        sides = {"broadcast": grouped, "plain": plain}
        seconds: dict[str, list[float]] = {n: [] for n in sides}
        memory: dict[str, int] = {}
        for turn in range(2 if quick else 7):
            for name, batch in sides.items():
                going = trainer.step.over(cycle([batch]))
                step_seconds(going, 1 if quick else 3)
                found = step_seconds(going, 1 if quick else 10)
                memory[name] = working_bytes(going)
                seconds[name] += [found] if turn else []
    figures = {
        "train_speedup": median_ratio(seconds["plain"], seconds["broadcast"]),
        "broadcast_ms": 1e3 * statistics.median(seconds["broadcast"]),
        "plain_ms": 1e3 * statistics.median(seconds["plain"]),
    }
    if on_gpu():
        figures |= {"memory_ratio": memory["plain"] / memory["broadcast"], "plain_mb": memory["plain"] / 2**20}
    return figures


def precision(log: Dataset, quick: bool) -> dict[str, Any]:
    size = 32 if quick else 2048
    usual = workload.config(requests_per_batch=size, compute=ComputeConfig(tf32=False))
    sides: dict[str, RunConfig] = {
        "float32": usual,
        "tf32": replace(usual, compute=ComputeConfig()),
        "not_deterministic": replace(usual, compute=ComputeConfig(deterministic=False)),
        "bf16": replace(usual, compute=ComputeConfig(bf16=True)),
        "without_overlap": replace(usual, compute=ComputeConfig(), sharding=ShardingConfig(pipeline=False)),
        "micro_batches_4": replace(usual, compute=ComputeConfig(micro_batches=4)),
    }
    if not quick:
        sides["compiled"] = replace(usual, compute=ComputeConfig(compile=True))
        sides["compiled_bf16"] = replace(usual, compute=ComputeConfig(compile=True, bf16=True))
    figures: dict[str, Any] = {"requests_per_batch": size}
    for name, run in sides.items():
        figures[name] = attempt(lambda run=run: timed(run, log, **effort(quick)))  # type: ignore[misc]
        tell(name, figures[name])
    return figures


def places(folder: Path, quick: bool) -> dict[str, Any]:
    """One table of items of 32 values a row: 20 million rows are 2.6 GB."""
    rows, size = (20_000, 32) if quick else (20_000_000, 1024)
    log = workload.log(folder / "places", requests=4 * size, candidates=CANDIDATES, history=HISTORY)
    tables = grown(log, rows)
    usual = workload.config(requests_per_batch=size)
    kernels = {"fused": ("fused",)} | (
        {"fused_uvm_caching": ("fused_uvm_caching",), "fused_uvm": ("fused_uvm",)} if on_gpu() else {}
    )
    figures: dict[str, Any] = {"rows": rows, "requests_per_batch": size}
    for name, kernel in kernels.items():
        for prefetch in (False, True) if name == "fused_uvm_caching" else (False,):
            run = replace(usual, sharding=ShardingConfig(table_kernels={"item": kernel}, prefetch=prefetch))
            label = name + ("_prefetched" if prefetch else "")
            before = torch.cuda.memory_allocated() if on_gpu() else 0
            with made(run, tables) as trainer:
                held = (torch.cuda.memory_allocated() if on_gpu() else 0) - before
                going = trainer.step.over(workload.repeated(trainer, 4))
                step_seconds(going, WARMUP)
                ms = 1e3 * statistics.median(step_seconds(going, 2 if quick else 10) for _ in range(1 if quick else 5))
            figures[label] = {"step_ms": ms, "held_mb": held / 2**20}
            tell(label, figures[label])
    return figures


def grown(log: Dataset, rows: int) -> Dataset:
    """The same log whose items' vocabulary has so many ids, of which it uses few."""
    vocabularies = tuple(replace(v, size=rows) if v.name == "item" else v for v in log.schema.vocabularies)
    schema = replace(log.schema, vocabularies=vocabularies)
    return replace(log, description=replace(log.description, schema=schema))


def plan(log: Dataset, quick: bool) -> dict[str, Any]:
    """What the planner expects of this device, and what is there."""
    size = 32 if quick else 2048
    run = workload.config(requests_per_batch=size)
    with made(run, log) as trainer:
        device = torch.cuda.get_device_name().lower() if on_gpu() else "h100"
        kind = next((k for k in GPUS if k in device), "h100")
        cluster = Cluster(gpu=GPUS[kind], nodes=1, gpus_per_node=1)
        work = Workload(trainer.plan, candidates_per_request=log.candidates_per_request(run.surfaces))
        expected = work.place(cluster).as_dict()
        going = trainer.step.over(workload.repeated(trainer, 4))
        step_seconds(going, WARMUP)
        trainer.clock.read()
        seconds = step_seconds(going, 2 if quick else 20)
        parts = trainer.clock.read()
        found = {
            "held_mb": torch.cuda.memory_allocated() / 2**20 if on_gpu() else None,
            "working_mb": working_bytes(going) / 2**20,
            "step_ms": 1e3 * seconds,
            "lookup_share": parts["lookup"] / sum(parts.values()),
        }
    keys = ("hbm_bytes_of_fullest_gpu", "embedding_step_ms_of_slowest_gpu")
    return {"expected": {k: expected[k] for k in keys}, "measured": found}


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured, or why it could not be: plain rows may not fit, torch.compile needs a Triton that does."""
    try:
        return measure()
    except (RuntimeError, ImportError) as error:
        return {"failed": f"{type(error).__name__}: {error}"[:400]}


def tell(name: str, found: Any) -> None:
    print({name: found}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small batches, few steps: does it run, not what is true")
    parser.add_argument("--rows", type=int, default=8_192, help="candidates a batch of `broadcast`, at 128 events")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    asked = parser.parse_args()
    quick = asked.quick
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log = workload.log(
            folder / "log", requests=512 if quick else 16_384, candidates=CANDIDATES, history=32 if quick else HISTORY
        )
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "speed": lambda: speed(log, quick),
            "loader": lambda: loader(log, quick),
            "broadcast": lambda: broadcast(folder, quick, asked.rows),
            "precision": lambda: precision(log, quick),
            "places": lambda: places(folder, quick),
            "plan": lambda: plan(log, quick),
        }
        for part in asked.parts:
            figures[part] = parts[part]()
            tell(part, figures[part])
    Report("gpu", {"quick": quick, "parts": list(asked.parts), "rows": asked.rows}).finish(figures)


if __name__ == "__main__":
    main()
