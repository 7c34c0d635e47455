"""What serving an artifact costs: latency, throughput, processor time, operations and bytes over shapes of batches.

Times are of made-up rows (`pipeline.serve.example`), whose ids are spread evenly over the tables: caches see no
popular rows, so the figures are a little worse than on real traffic. Compare figures of one machine only.

A shape is run until the 95 % interval of its mean time is narrow enough (`precision`), or the repeats or the time are
used up; the interval that was reached is reported, and so is that of each percentile, by order statistics.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.errors import ConfigError
from pipeline.progress import Progress, untold
from pipeline.serve.artifact import COMPILED, METRICS, ArtifactInfo, open_artifact
from pipeline.serve.example import made_up_requests
from pipeline.serve.measure import half_interval, one_thread, peak_bytes, percentile_interval, times
from pipeline.serve.pruning import flops
from pipeline.serve.rows import to_requests
from pipeline.serve.runtime import Program, load_program
from pipeline.serve.scorer import Scorer
from pipeline.serve.signature import Signature
from pipeline.serve.tables import is_table

if TYPE_CHECKING:
    from pipeline.evaluate.charts import Band

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One kind of batch.

    Args:
        requests: requests in a batch.
        candidates: of each request.
        history: events of each request.
    """

    requests: int
    candidates: int
    history: int


def devices() -> tuple[str, ...]:
    """Devices that artifacts can be measured on here."""
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def profile(
    artifact: str | Path | ArtifactInfo,
    *,
    requests: Sequence[int] = (1, 16),
    candidates: Sequence[int] = (1, 16, 64, 256),
    history: Sequence[int] | None = None,
    repeats: int = 2000,
    seconds: float = 2.0,
    precision: float = 0.02,
    device: str = "cpu",
    progress: Progress = untold,
) -> dict[str, object]:
    """Measure an artifact over all combinations of the given sizes, one operator at a time (one thread).

    Args:
        artifact: its folder, or the opened artifact.
        requests: requests in a batch.
        candidates: of each request.
        history: events of each request; None takes none and as many as the artifact reads.
        repeats: the most measured runs of each shape, after a few that are not.
        seconds: stop a shape's runs after this time, however many were made.
        precision: half the width of the 95 % interval of the mean, relative, at which a shape is known well enough.
        device: cpu or cuda.
        progress: told of every shape.

    Returns:
        For JSON: the artifact, and for each shape the milliseconds of the whole scorer on an Arrow table
        (`score_ms`) and of the program alone on tensors (`program_ms`), by percentile with intervals, candidates and
        requests per second of the whole, processor seconds per thousand candidates, operations, bytes and memory.

    Raises:
        ArtifactError: it is missing or damaged.
        ConfigError: no size, or one that is not positive, or a device that is not here.
    """
    info = artifact if isinstance(artifact, ArtifactInfo) else open_artifact(artifact)
    longest = info.signature.history_length
    history = sorted({0, longest}) if history is None else history
    for name, sizes, least in (("requests", requests, 1), ("candidates", candidates, 1), ("history", history, 0)):
        if not sizes or min(sizes) < least:
            raise ConfigError(f"{name} is {list(sizes)}; give one or more numbers of at least {least}")
    if repeats < 1 or seconds <= 0 or precision <= 0:
        raise ConfigError(
            f"repeats is {repeats}, seconds {seconds:g} and precision {precision:g}; all must be positive"
        )
    if device not in devices():
        raise ConfigError(f"device is {device!r}; this machine can measure on {', '.join(devices())}")
    at = torch.device(device)
    scorer = Scorer.open(info, device=at)
    # Operations are counted on the graph: compiled code does not tell.
    graph = load_program(info.path, info.signature, device=at, compiled=False)
    shapes = [
        Shape(requests=r, candidates=c, history=h)
        for r, c, h in product(requests, candidates, sorted({min(h, longest) for h in history}))
    ]
    with one_thread():
        found = []
        for done, shape in enumerate(shapes, 1):
            found.append(_measure(scorer, graph, shape, repeats, seconds, precision))
            progress(done, len(shapes), f"measuring {info.surface}")
    return {
        "surface": info.surface,
        "digest": info.digest,
        "dtype": info.signature.dtype,
        "bytes": info.bytes,
        "compiled": COMPILED in info.manifest.files and device == "cpu",
        "device": device if device == "cpu" else torch.cuda.get_device_name(),
        "threads": 1,
        "max_requests": info.signature.max_requests,
        "pruning": info.read(METRICS)["pruning"],
        "shapes": found,
    }


def by_candidates(profiled: Mapping[str, Any], *, requests: int, history: int, percentile: str = "p50") -> Band:
    """Milliseconds of the whole scorer over candidates a request, as a line for a figure.

    Args:
        profiled: from `profile`.
        requests, history: of the batch; a history longer than the artifact reads is its longest.
        percentile: p50, p90, p99 or mean.

    Raises:
        ConfigError: no such shape was measured.
    """
    from pipeline.evaluate.charts import Band  # here, because it brings Matplotlib

    longest = max(s["history"] for s in profiled["shapes"])
    shapes = [s for s in profiled["shapes"] if (s["requests"], s["history"]) == (requests, min(history, longest))]
    if not shapes:
        raise ConfigError(f"no shape of {requests} requests with {history} events was measured")
    times = [s["score_ms"] for s in shapes]
    ends = [t["mean_interval"] if percentile == "mean" else t["intervals"][percentile] for t in times]
    return Band(
        x=[s["candidates"] for s in shapes],
        y=[t[percentile] for t in times],
        low=None if None in ends else [low for low, _ in ends],
        high=None if None in ends else [high for _, high in ends],
    )


def shape_table(signature: Signature, shape: Shape) -> pa.Table:
    """Made-up grouped rows of a shape."""
    return made_up_requests(
        signature.schema,
        signature.surface,
        candidates=[shape.candidates] * shape.requests,
        history=[shape.history] * shape.requests,
    )


def _measure(
    scorer: Scorer, graph: Program, shape: Shape, repeats: int, seconds: float, precision: float
) -> dict[str, object]:
    table = shape_table(scorer.signature, shape)
    block = to_requests(table, scorer.signature, "the profile's rows").block
    device = scorer.program.device
    tensors = {n: t.to(device) for n, t in scorer.signature.tensors.tensors(block).items()}
    wait = torch.cuda.synchronize if device.type == "cuda" else nullcontext

    def program() -> None:
        with torch.inference_mode():
            scorer.program(tensors)
            wait()

    limits = {"repeats": repeats, "seconds": seconds, "precision": precision}
    processor, runs = time.process_time(), 0

    def score() -> None:
        nonlocal runs
        runs += 1
        scorer.score(table)

    whole = times(score, **limits)  # type: ignore[arg-type]
    processor = (time.process_time() - processor) / runs
    alone = times(program, **limits)  # type: ignore[arg-type]
    rate = 1000 / float(whole.mean())
    total = shape.requests * shape.candidates
    return {
        **asdict(shape),
        "runs": whole.size,
        "score_ms": _summary(whole),
        "program_ms": _summary(alone),
        "requests_per_second": shape.requests * rate,
        "candidates_per_second": total * rate,
        "seconds_per_thousand_candidates": 1 / rate / total * 1000,
        "processor_seconds_per_thousand_candidates": processor / total * 1000,
        "flops": flops(lambda: graph(tensors)),
        "bytes_read": _bytes_read(graph, tensors),
        "peak_mb": peak_bytes(lambda: graph(tensors), device) / 1e6,
    }


def _bytes_read(graph: Program, tensors: dict[str, torch.Tensor]) -> int:
    """Inputs, dense weights, and the rows of tables that are looked up, each time that they are."""
    weights = graph.tensors()
    dense = sum(t.nbytes for name, t in weights.items() if not is_table(name))
    rows = 0
    for name, places in tensors.items():
        matrix = weights.get(f"tables.rows_{name.rpartition('_')[2]}")
        if matrix is not None and "_rows_" in name:
            rows += places.numel() * matrix[0].nbytes
    return dense + rows + sum(t.nbytes for t in tensors.values())


def _summary(found: np.ndarray) -> dict[str, object]:
    """Percentiles and mean of milliseconds, each with its 95 % interval."""
    half = half_interval(found)
    mean = float(found.mean())
    return {
        **{f"p{p}": float(np.percentile(found, p)) for p in PERCENTILES},
        "mean": mean,
        "mean_interval": [mean - half, mean + half] if np.isfinite(half) else None,
        "intervals": {f"p{p}": list(percentile_interval(found, p)) for p in PERCENTILES},
    }
