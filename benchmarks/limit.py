"""A whole training step, loader included, against what the machine could do at most.

    python -m benchmarks.limit [--quick] [--parts usual batches wide] [--bf16] [--compile]

One thread. The limit of a step is the sum of

- the floating-point operations of the dense part's matrix products, attention's among them, forward and backward, at
  the rate of a 1024 x 1024 x 1024 product in float32, measured in turn with the steps; a product that the backward pass
  makes again (attention's scores) is no operation of the limit;
- the bytes of its embedding part at the rate of a large copy: for every id looked up a row read, written out, its
  gradient written and read, the row read and written again by the optimizer.

Processor time, so that neighbours on the machine weigh less: the median step on ready batches plus the loader's mean
time for a batch, as if one core did both.

- `step_over_limit`: median step / limit at 128 requests a batch; 1 is the limit. `_b64`, `_b256`: other batches.
- `limit_reached`: its inverse; `limit_reached_without_attention`: with attention's operations left out of the limit,
  its time still in the step.
- `step_ms`, `loader_ms`, `gflop`, `attention_gflop`, `embedding_mb`, `gemm_gflops`, `copy_gb_per_s`: the parts.
- `shares`: of the step's operators, by kind, from torch.profiler: where the time goes.
- `_width_128`: a wider model, of history width 128 and layers of 512 and 256.

With --bf16 or --compile the model runs so, and the limit stays that of float32.

What it does not show: several threads, GPUs, logs with short histories.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import workload
from benchmarks.common import Report
from pipeline.config import ComputeConfig, RunConfig
from pipeline.data.batch import Batch
from pipeline.data.logs import Dataset
from pipeline.train.trainer import Trainer

CANDIDATES, HISTORY = 16, 128
PARTS = ("usual", "batches", "wide")
REACHED = ("step_over_limit", "limit_reached", "limit_reached_without_attention")
# Kinds of operators, by a part of the name; the first that fits.
KINDS = {
    "attention": ("flash_attention",),
    "products": ("::mm", "addmm", "bmm"),
    "tables": ("fbgemm::split_embedding", "c10d", "permute"),
    "activations": ("gelu", "relu", "threshold", "sigmoid", "softmax", "clamp"),
    "layer norms": ("layer_norm",),
    "optimizer": ("Optimizer", "_fused_adam"),
    "padding and copies": ("jagged", "cat", "copy", "index", "scatter", "fill", "zero", "pad"),
    "small tables": ("embedding",),
    "sums": ("::add", "::sum", "::mul", "addcmul"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one batch size, fewer steps; under a minute")
    parser.add_argument("--bf16", action="store_true", help="train the dense part under bfloat16 autocast")
    parser.add_argument("--compile", action="store_true", help="compile the dense part")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="of the full form, which to run")
    asked = parser.parse_args()
    steps = 6 if asked.quick else 16
    base = workload.config(compute=ComputeConfig(bf16=asked.bf16, compile=asked.compile))
    model = base.model
    wide = replace(model, history=replace(model.history, width=128, heads=4), deep=(512, 256))
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        log = workload.log(
            Path(folder) / "log", requests=2048 if asked.quick else 8192, candidates=CANDIDATES, history=HISTORY
        )
        if asked.quick or "usual" in asked.parts:
            figures |= measured(base, log, Path(folder), steps, profile=not asked.quick)
        if not asked.quick and "batches" in asked.parts:
            for size in (64, 256):
                run = replace(base, loader=replace(base.loader, requests_per_batch=size))
                figures |= {
                    f"{n}_b{size}": v for n, v in measured(run, log, Path(folder), steps).items() if n in REACHED
                }
        if not asked.quick and "wide" in asked.parts:
            found = measured(replace(base, model=wide), log, Path(folder), steps)
            figures |= {f"{n}_width_128": v for n, v in found.items() if n in REACHED}
    settings = {
        "quick": asked.quick,
        "steps": steps,
        "candidates": CANDIDATES,
        "history": HISTORY,
        "requests_per_batch": base.loader.requests_per_batch,
        "compute": asdict(base.compute),
        "model": asdict(base.model),
    }
    Report("limit", settings).finish(figures)


def measured(run: RunConfig, log: Dataset, folder: Path, steps: int, *, profile: bool = False) -> dict[str, Any]:
    """Steps of a run, and their limit."""
    with workload.trainer(run, log, folder / "run" / "checkpoints") as trainer:
        batches = list(islice(trainer.loader.batches(0), 4))
        flops, attention = operations(trainer, batches)
        bytes_of_tables = statistics.mean(table_bytes(trainer, b) for b in batches)
        seconds, rates, copies = [], [], []
        trained = trainer.steps(cycle(batches))
        for _ in range(3):
            next(trained)
        for _ in range(steps):
            rates.append(gemm_rate())
            copies.append(copy_rate())
            start = time.process_time()
            next(trained)
            seconds.append(time.process_time() - start)
        gemm, copy = statistics.median(rates), statistics.median(copies)
        bare = flops / gemm + bytes_of_tables / copy
        limit = bare + attention / gemm
        loader = loader_seconds(trainer)
        step = statistics.median(seconds) + loader
        figures: dict[str, Any] = {
            "step_over_limit": step / limit,
            "limit_reached": limit / step,
            "limit_reached_without_attention": bare / step,
            "step_ms": 1e3 * step,
            "loader_ms": 1e3 * loader,
            "gflop": flops / 1e9,
            "attention_gflop": attention / 1e9,
            "embedding_mb": bytes_of_tables / 1e6,
            "gemm_gflops": gemm / 1e9,
            "copy_gb_per_s": copy / 1e9,
        }
        if profile:
            figures["shares"] = shares(trained)
        trained.close()
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in figures.items()}


def gemm_rate() -> float:
    """Operations a second of a product of two matrices of 1024 x 1024, float32."""
    a, b = torch.ones(1024, 1024), torch.ones(1024, 1024)
    return 2 * 1024**3 / min(_seconds(lambda: a @ b) for _ in range(3))


def copy_rate() -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    a, b = torch.ones(2**24), torch.ones(2**24)
    return 2 * a.nbytes / min(_seconds(lambda: b.copy_(a)) for _ in range(2))


def _seconds(work: Any) -> float:
    start = time.thread_time()
    work()
    return time.thread_time() - start


def operations(trainer: Trainer, batches: list[Batch]) -> tuple[float, float]:
    """Mean floating-point operations of a step on the batches: of products, and of attention."""
    settings = trainer.config.model.history
    attention = 0.0
    for batch in batches:
        inputs = batch.inputs
        requests, events = inputs.candidate_counts.shape[0], inputs.history_slots.shape[0]
        candidates = inputs.candidate_slots.shape[0]
        # Two products forward and four backward.
        attention += 3 * 4 * settings.width * requests * events * (settings.layers * events + candidates)
    trained = trainer.steps(cycle(batches))
    next(trained)
    with FlopCounterMode(display=False) as counter:
        for _ in batches:
            next(trained)
    trained.close()
    counted = counter.get_flop_counts().get("Global", {})
    inside = sum(n for name, n in counted.items() if "attention" in str(name))
    return (counter.get_total_flops() - inside) / len(batches), attention / len(batches)


def table_bytes(trainer: Trainer, batch: Batch) -> float:
    """Least bytes that the embedding part of a step moves."""
    ids = (batch.inputs.request_ids, batch.inputs.candidate_ids, batch.inputs.sequence_ids)
    return float(sum(k.values().numel() for k in ids) * trainer.config.model.embedding_dim * 4 * 6)


def loader_seconds(trainer: Trainer) -> float:
    """Processor seconds to make a batch."""
    start, count = time.process_time(), 0
    for _ in trainer.loader.batches(0):
        count += 1
    return (time.process_time() - start) / count


def shares(trained: Iterator[Any]) -> dict[str, float]:
    """Share of each kind of operator in the time of a few steps."""
    with torch.profiler.profile() as profile:
        for _ in range(4):
            next(trained)
    total, found = 0.0, dict.fromkeys([*KINDS, "other"], 0.0)
    for event in profile.key_averages():
        kind = next((k for k, parts in KINDS.items() if any(p in event.key for p in parts)), "other")
        found[kind] += event.self_cpu_time_total
        total += event.self_cpu_time_total
    return {kind: round(spent / total, 3) for kind, spent in found.items()}


if __name__ == "__main__":
    main()
