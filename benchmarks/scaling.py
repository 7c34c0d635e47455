"""One rank against two, one thread each, over gloo on this machine.

    python -m benchmarks.scaling [--quick]

Training steps with the exchange of ids and rows and the all-reduce of dense gradients, on ready batches; wall time of
the steps after the first ones. Every setting is run in turn, several times.

- `weak_2_over_1`: requests a second of two ranks with the batch of one each, over those of one rank; 2 is perfect.
- `strong_2_over_1`: the same with one rank's batch shared by two.
- `independent_2_over_1`: two processes of one rank each that know nothing of each other, over one alone: what the
  machine allows at best (shared memory, neighbours). `weak_over_independent`: the share of it that is reached.
- `exchange_share`: of the time of a step on two ranks, by the step's own clock: waiting for ids; and
  `lookup_share`: tables and the rows' way back.

What it does not show: machines joined by a network, GPUs, more than two ranks.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from benchmarks.common import Report, interleaved

CANDIDATES, HISTORY = 16, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps, one round; about a minute")
    quick = parser.parse_args().quick
    batch, steps, rounds = (32, 6, 1) if quick else (128, 12, 3)
    from benchmarks import workload

    shares: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        workload.log(Path(folder) / "log", requests=16 * batch, candidates=CANDIDATES, history=HISTORY)

        def rate(groups: int, ranks: int, requests: int) -> float:
            found = run_groups(Path(folder), groups=groups, ranks=ranks, requests_per_batch=requests, steps=steps)
            if ranks == 2:
                shares.append(found[0]["parts"])
            return sum(f["requests_per_second"] for f in found)

        rates = interleaved(
            {
                "one": lambda: rate(1, 1, batch),
                "weak": lambda: rate(1, 2, 2 * batch),
                "strong": lambda: rate(1, 2, batch),
                "independent": lambda: rate(2, 1, batch),
            },
            rounds,
        )
    figures = {f"{name}_2_over_1": ratio(rates[name], rates["one"]) for name in ("weak", "strong", "independent")}
    figures["weak_over_independent"] = ratio(rates["weak"], rates["independent"])
    figures["exchange_share"] = statistics.median(s["exchange"] for s in shares)
    figures["lookup_share"] = statistics.median(s["lookup"] for s in shares)
    figures["requests_per_second_of_one"] = statistics.median(rates["one"])
    settings = {"quick": quick, "rounds": rounds, "steps": steps, "requests_per_batch": batch}
    settings |= {"candidates": CANDIDATES, "history": HISTORY, "load": os.getloadavg()[0]}
    Report("scaling", settings).finish({k: float(f"{v:.4g}") for k, v in figures.items()})


def ratio(a: list[float], b: list[float]) -> float:
    """Median of ratios within rounds."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def run_groups(folder: Path, *, groups: int, ranks: int, requests_per_batch: int, steps: int) -> list[dict[str, Any]]:
    """What each group of ranks reports; all processes start their timed steps together."""
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    start = context.Barrier(groups * ranks)
    processes = []
    for _ in range(groups):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes += [
            context.Process(
                target=_rank, args=(rank, ranks, port, folder, requests_per_batch, steps, start, results), daemon=True
            )
            for rank in range(ranks)
        ]
    for process in processes:
        process.start()
    found = [results.get(timeout=900) for _ in range(groups)]
    for process in processes:
        process.join()
    return found


def _rank(
    rank: int, ranks: int, port: int, folder: Path, requests_per_batch: int, steps: int, start: Any, results: Any
) -> None:
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ |= {k: str(v) for k, v in environment.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    from benchmarks import workload
    from pipeline.data.logs import Dataset

    run = workload.config(requests_per_batch=requests_per_batch)
    with workload.trainer(run, Dataset.open(folder / "log"), folder / "run" / "checkpoints") as trainer:
        batches = list(islice(trainer.loader.batches(0), 4))
        trained = trainer.steps(cycle(batches))
        for _ in range(3):
            next(trained)
        start.wait()
        trainer.clock.read()
        began = time.perf_counter()
        for _ in range(steps):
            next(trained)
        seconds = time.perf_counter() - began
        parts = {k: v / seconds for k, v in trainer.clock.read().items()}
        if rank == 0:
            results.put({"requests_per_second": requests_per_batch * steps / seconds, "parts": parts})
        trainer.ranks.barrier()


if __name__ == "__main__":
    main()
