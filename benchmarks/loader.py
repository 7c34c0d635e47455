"""The loader against bare Parquet decoding, and grouped logs against flat ones.

    python -m benchmarks.loader [--quick]

One thread each, no prefetching, processor time (so that neighbours on the machine weigh less), rounds interleaved.

- `ready_over_bare`: rate of ready batches (shuffled, checked, as tensors) / rate of `ParquetFile.iter_batches` over the
  same files and columns; medians of ratios within rounds.
- `flat_over_grouped_decoded_bytes`, `flat_over_grouped_disk_bytes`: the same log with one row a candidate, request and
  history columns repeated, in the same row order and with the same compression, over the grouped one: bytes
  of decoded Arrow buffers, and of files.
- `batches_per_second`, `requests_per_second`: of ready batches.
- `first_batch_s`, `resume_s`: from making a loader to its first batch, at step 0 and in mid-epoch.
- `held_mb`, `held_mb_by_tenth`: decoded rows that the loader holds, at most and over the epoch, with buffers made small
  (`MEMORY`, row groups of 256 requests) so that the log is several times larger; `bound_mb`: what the loader's
  docstring allows; `log_over_held`: decoded bytes of the log over `held_mb`; `batch_mb`: one batch; `peak_mb`: growth
  of resident memory over an epoch, Arrow's and torch's caches included.

What it does not show: reading from a network store (files are in the page cache), several ranks on one disk, the share
of training time spent waiting (measured in training: `Loader.waited_s`), and logs whose row groups are so many
that a block touches a new one in every lane; simulated ids compress better than real ones, which flatters
disk ratios and quickens the bare decoding.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from benchmarks.common import Report, interleaved, median_ratio
from pipeline.config import LoaderConfig
from pipeline.data.block import columns_of
from pipeline.data.layout import FeatureLayout, feature_layout
from pipeline.data.loader import Loader
from pipeline.data.logs import Dataset
from pipeline.data.simulate import SimulationConfig, simulate
from pipeline.data.writer import LogWriter
from pipeline.schema import Level

CANDIDATES, HISTORY = 8, 100
MEMORY = LoaderConfig(requests_per_batch=256, prefetch_batches=0, lanes=8, window=128)
MEMORY_ROW_GROUP = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller log, fewer rounds; under a minute")
    quick = parser.parse_args().quick
    requests, rounds = (20_000, 5) if quick else (60_000, 11)
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    config = LoaderConfig(requests_per_batch=1024, prefetch_batches=0)
    with tempfile.TemporaryDirectory() as folder:
        simulated = SimulationConfig(
            requests=requests,
            days=3,
            users=requests // 100,
            candidates=CANDIDATES,
            history=HISTORY,
            candidate_spread=0,
            warmup_days=5,
        )
        log = simulate(Path(folder) / "grouped", simulated)
        layout = feature_layout(log.schema, surfaces=log.schema.surfaces, tasks=log.schema.tasks)
        figures = rates(log, layout, config, rounds) | starts(log, layout, config, 3 if quick else 7)
        figures |= memory(smaller_row_groups(log, Path(folder) / "small"), layout) | flat_over_grouped(
            log, layout, Path(folder) / "flat"
        )
    settings = {
        "quick": quick,
        "rounds": rounds,
        "requests": requests,
        "candidates": CANDIDATES,
        "history": HISTORY,
        "features": len(layout.features),
        "surfaces": len(layout.surfaces),
        "requests_per_batch": config.requests_per_batch,
        "lanes": config.lanes,
        "window": config.window,
        "row_group_requests": simulated.row_group_requests,
    }
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}
    Report("loader", settings).finish(rounded)


def loader_of(log: Dataset, layout: FeatureLayout, config: LoaderConfig) -> Loader:
    return Loader(log, layout, config, days=None, seed=0)


def files_of(log: Dataset, layout: FeatureLayout) -> Iterator[tuple[str, Path, list[str]]]:
    """Surface, path and columns of every file."""
    for surface in layout.surfaces:
        columns = columns_of(log.schema, surface, layout.features, layout.tasks)
        for partition in log.partitions(surface):
            for file in partition.files:
                yield surface, log.root / file.path, columns


def rates(log: Dataset, layout: FeatureLayout, config: LoaderConfig, rounds: int) -> dict[str, Any]:
    """Ready batches against bare decoding."""
    loader = loader_of(log, layout, config)

    def ready() -> float:
        start = time.process_time()
        for _ in loader.batches(0):
            pass
        return time.process_time() - start

    def bare() -> float:
        start = time.process_time()
        for _, path, columns in files_of(log, layout):
            with pq.ParquetFile(path) as file:
                for _ in file.iter_batches(columns=columns, use_threads=False):
                    pass
        return time.process_time() - start

    ready(), bare()  # allocators and page cache
    seconds = interleaved({"bare": bare, "ready": ready}, rounds)
    spent = statistics.median(seconds["ready"])
    return {
        "ready_over_bare": median_ratio(seconds["bare"], seconds["ready"]),
        "batches_per_second": loader.steps / spent,
        "requests_per_second": sum(loader.sizes.values()) / spent,
    }


def starts(log: Dataset, layout: FeatureLayout, config: LoaderConfig, rounds: int) -> dict[str, Any]:
    """Seconds from making a loader to its first batch."""

    def start(share: float) -> float:
        before = time.perf_counter()
        loader = loader_of(log, layout, config)
        next(iter(loader.batches(0, int(share * loader.steps))))
        return time.perf_counter() - before

    seconds = interleaved({"first": lambda: start(0), "resume": lambda: start(0.6)}, rounds)
    return {
        "first_batch_s": statistics.median(seconds["first"]),
        "resume_s": statistics.median(seconds["resume"]),
    }


def smaller_row_groups(log: Dataset, folder: Path) -> Dataset:
    """The same rows in row groups of `MEMORY_ROW_GROUP` requests."""
    writer = LogWriter(folder, log.schema, row_group_requests=MEMORY_ROW_GROUP)
    for partition in log.description.partitions:
        for file in partition.files:
            table = pq.ParquetFile(log.root / file.path).read(use_threads=False)
            writer.write(partition.surface, partition.date, table)
    return writer.close({})


def memory(log: Dataset, layout: FeatureLayout) -> dict[str, Any]:
    """Memory over an epoch."""
    loader = loader_of(log, layout, MEMORY)
    decoded = sum(
        pq.ParquetFile(path).read(columns=columns, use_threads=False).nbytes
        for _, path, columns in files_of(log, layout)
    )
    before = peak = resident_mb()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, resident_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    held, batch_mb = [], 0.0
    for batch in loader.batches(0):
        held.append(loader.bytes / 2**20)
        inputs = batch.inputs
        kjts = (inputs.request_ids, inputs.candidate_ids, inputs.sequence_ids)
        dense = [v for v in [*vars(inputs).values(), *vars(batch).values()] if isinstance(v, torch.Tensor)]
        dense += [t for k in kjts for t in (k.values(), k.lengths())]
        batch_mb = max(batch_mb, sum(t.nbytes for t in dense) / 2**20)
    done.set()
    watcher.join()
    tenth = max(len(held) // 10, 1)
    return {
        "held_mb": max(held),
        "held_mb_by_tenth": [round(max(held[i : i + tenth]), 1) for i in range(0, len(held), tenth)],
        "log_over_held": decoded / 2**20 / max(held),
        "bound_mb": bound_mb(loader),
        "batch_mb": batch_mb,
        "peak_mb": peak - before,
    }


def bound_mb(loader: Loader) -> float:
    """The bound of the loader's docstring, for logs of this benchmark."""
    config, total = loader.config, 0.0
    for surface, size in loader.sizes.items():
        columns = loader.dataset.schema.select(surface=surface)
        of_candidate = sum(f.level is Level.CANDIDATE for f in columns) + len(loader.layout.tasks) + 1
        of_request = 8 * (len(columns) - of_candidate) + 8 * CANDIDATES * of_candidate + 28 * HISTORY
        row_group = max(n for p in loader.dataset.partitions(surface) for f in p.files for n in f.row_group_rows)
        block = min(config.lanes * config.window, size)
        groups = min(config.lanes * (1 + ceil(config.window / row_group)) * row_group, size)
        total += (2 * block + groups) * of_request
    return total / 2**20


def resident_mb() -> float:
    """Resident memory of this process."""
    with open("/proc/self/statm") as stat:
        return int(stat.read().split()[1]) * 4096 / 2**20


def flat_over_grouped(log: Dataset, layout: FeatureLayout, folder: Path) -> dict[str, Any]:
    """The same rows, one a candidate: decoded bytes and disk bytes over those of the grouped log."""
    folder.mkdir()
    decoded, disk = {"flat": 0, "grouped": 0}, {"flat": 0, "grouped": 0}
    for number, (surface, path, columns) in enumerate(files_of(log, layout)):
        grouped = pq.ParquetFile(path).read(columns=columns, use_threads=False)
        of_candidate = {f.name for f in log.schema.select(surface=surface, level=Level.CANDIDATE)} | set(layout.tasks)
        counts = pc.list_value_length(grouped[layout.tasks[0]])
        of_row = pa.array(np.repeat(np.arange(grouped.num_rows), counts.to_numpy()))
        flat = pa.table(
            {c: pc.list_flatten(grouped[c]) if c in of_candidate else grouped[c].take(of_row) for c in columns}
        )
        for name, table in (("flat", flat), ("grouped", grouped)):
            target = folder / f"{name}-{number}.parquet"
            rows = 2048 * (CANDIDATES if name == "flat" else 1)
            pq.write_table(table, target, row_group_size=rows, compression="zstd", use_dictionary=True)
            disk[name] += target.stat().st_size
            decoded[name] += pq.ParquetFile(target).read(use_threads=False).nbytes
            target.unlink()
    return {
        "flat_over_grouped_decoded_bytes": decoded["flat"] / decoded["grouped"],
        "flat_over_grouped_disk_bytes": disk["flat"] / disk["grouped"],
    }


if __name__ == "__main__":
    main()
