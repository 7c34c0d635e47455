"""Request-level broadcasting against the plain model on expanded rows.

    python -m benchmarks.broadcast [--quick] [--histories 32 128 512]

The same model with the same weights is fed the same candidates twice: grouped, with a request's data once, and plain,
one row a candidate with the request's data repeated (`benchmarks.plain`). Whole training steps on one thread: tables
looked up, forward, backward, fused table updates, dense optimizer. Batches are made before the clock starts; what
plain costs the loader is not counted (`benchmarks.loader` has the bytes). Processor time; the two sides take turns.

- `train_speedup_cC_hH`: median over rounds of plain time / broadcast time, C candidates a request, H events a history.
- `plain_over_broadcast_c1`: the least of these at one candidate, where there is nothing to broadcast: below 1,
  broadcasting costs.
- `max_abs_diff`: largest difference of a logit or calibrated logit between the two, over all cells, before any
  update; `max_gradient_diff`: of a dense gradient, over the largest gradient of its parameter.

What it does not show: GPUs, memory (plain holds C times the activations), real logs, where requests have unequal
numbers of candidates and histories of unequal length.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import asdict
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from benchmarks import workload
from benchmarks.common import Report
from benchmarks.plain import expanded
from pipeline.config import ShardingConfig
from pipeline.data.batch import Batch
from pipeline.schema import Level
from pipeline.train.trainer import Trainer

CANDIDATES, HISTORIES = (1, 4, 16, 64), (32, 128, 512)
# Candidates of a batch; requests follow. Bounded by what the plain side can hold.
CANDIDATES_PER_BATCH = {32: 1024, 128: 512, 512: 128}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three cells, two rounds; under a minute")
    parser.add_argument("--histories", type=int, nargs="+", default=HISTORIES, help="of the full form, which to run")
    asked = parser.parse_args()
    quick = asked.quick
    cells = [(1, 32), (1, 128), (16, 128)] if quick else [(c, h) for h in asked.histories for c in CANDIDATES]
    # One candidate is the same batch twice, and the question a few per cent.
    rounds = {c: 9 if c == 1 else 3 for c, _ in cells}
    figures: dict[str, Any] = {}
    differences, gradient_differences, at_one = [], [], []
    for candidates, history in cells:
        size = CANDIDATES_PER_BATCH[history] // (4 if quick else 1)
        found = cell(candidates, history, max(size // candidates, 4), rounds[candidates])
        figures[f"train_speedup_c{candidates}_h{history}"] = found["speedup"]
        figures[f"broadcast_ms_c{candidates}_h{history}"] = found["broadcast_ms"]
        differences.append(found["difference"])
        gradient_differences.append(found["gradient_difference"])
        at_one += [found["speedup"]] if candidates == 1 else []
        print({k: v for k, v in figures.items() if k.endswith(f"c{candidates}_h{history}")}, flush=True)
    figures["plain_over_broadcast_c1"] = min(at_one)
    figures["max_abs_diff"] = max(differences)
    figures["max_gradient_diff"] = max(gradient_differences)
    run = workload.config()
    settings = {
        "quick": quick,
        "rounds": rounds,
        "candidates_per_batch": CANDIDATES_PER_BATCH,
        "model": asdict(run.model),
    }
    Report("broadcast", settings).finish({k: float(f"{v:.4g}") for k, v in figures.items()})


def cell(candidates: int, history: int, requests: int, rounds: int) -> dict[str, float]:
    """One number of candidates and events."""
    with tempfile.TemporaryDirectory() as folder:
        log = workload.log(Path(folder) / "log", requests=2 * requests, candidates=candidates, history=history)
        # Without overlap, so that a step's time is that of its own batch alone.
        run = workload.config(requests_per_batch=requests, sharding=ShardingConfig(pipeline=False))
        with workload.trainer(run, log, Path(folder) / "run" / "checkpoints") as trainer:
            grouped = next(iter(trainer.loader.batches(0)))
            keys = {f.name for f in log.schema.select(level=Level.CANDIDATE)}
            history_key = trainer.plan.layout.history_sequences[0]
            plain = expanded(grouped, candidate_keys=keys, history_key=history_key)
            difference, gradient_difference = differences(trainer, grouped, plain)
            seconds = turns(trainer, {"broadcast": grouped, "plain": plain}, rounds)
    ratios = [p / b for p, b in zip(seconds["plain"], seconds["broadcast"], strict=True)]
    return {
        "speedup": statistics.median(ratios),
        "broadcast_ms": 1e3 * statistics.median(seconds["broadcast"]),
        "difference": difference,
        "gradient_difference": gradient_difference,
    }


def turns(trainer: Trainer, sides: dict[str, Batch], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of training steps on the batches in turn, after one round to warm up."""
    steps = trainer.step.over(cycle(sides.values()))
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(1 + rounds):
        for name in sides:
            start = time.process_time()
            next(steps)
            if turn:
                seconds[name].append(time.process_time() - start)
    return seconds


def differences(trainer: Trainer, grouped: Batch, plain: Batch) -> tuple[float, float]:
    """Of outputs, and of dense gradients relative to the largest of each parameter."""
    found = []
    for batch in (grouped, plain):
        losses, outputs = trainer.model.module(batch)
        # Of dense parameters alone: a whole backward pass would move the tables.
        found.append((outputs, torch.autograd.grad(losses.sum(), trainer.window.dense)))
    (mine, my_gradients), (theirs, their_gradients) = found
    outputs_differ = max(
        float((a - b).abs().max()) for a, b in ((mine.logits, theirs.logits), (mine.calibrated, theirs.calibrated))
    )
    gradients_differ = max(
        float((a - b).abs().max() / a.abs().max().clamp(min=1e-12))
        for a, b in zip(my_gradients, their_gradients, strict=True)
    )
    return outputs_differ, gradients_differ


if __name__ == "__main__":
    main()
