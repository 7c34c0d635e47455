"""What serving an artifact costs: latency, throughput, processor time, operations and bytes over shapes of batches.

Times are of made-up rows (`pipeline.serve.example`), whose ids are spread evenly over the tables: caches see no
popular rows, so the figures are a little worse than on real traffic. Compare figures of one machine only.

Shapes take turns, so that a slow spell of the machine shows as width and not as a difference of shapes. In each of six
turns a shape is run until the 95 % interval of its mean is narrow enough (`precision`), or its share of the repeats or
of the time is used up. The interval of a time goes from its least to its largest turn: if turns are independent, it
holds the median turn with probability 1 - 2 / 2**6 = 97 %, whatever the distribution.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
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
from pipeline.serve.measure import one_thread, peak_bytes, times
from pipeline.serve.pruning import flops
from pipeline.serve.rows import to_requests
from pipeline.serve.runtime import Program, load_program
from pipeline.serve.scorer import Scorer
from pipeline.serve.signature import Signature
from pipeline.serve.tables import is_table

if TYPE_CHECKING:
    from pipeline.evaluate.charts import Band

PERCENTILES = (50, 90, 99)
TURNS = 6


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
        repeats: the most measured runs of each shape, over all turns; each turn begins with a few that are not.
        seconds: stop a shape's runs after this time over all turns, however many were made.
        precision: half the width of the 95 % interval of a turn's mean, relative, at which it is known well enough.
        device: cpu or cuda.
        progress: told of every turn of a shape.

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
    turns = min(TURNS, repeats)
    with one_thread():
        measured = [_Measured(scorer, graph, shape) for shape in shapes]
        for turn in range(turns):
            for done, shape in enumerate(measured, 1):
                shape.turn(repeats=-(-repeats // turns), seconds=seconds / turns, precision=precision)
                progress(turn * len(shapes) + done, turns * len(shapes), f"measuring {info.surface}")
        found = [shape.result() for shape in measured]
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
    ends = [t["intervals"][percentile] for t in times]
    return Band(
        x=[s["candidates"] for s in shapes],
        y=[t[percentile] for t in times],
        low=[low for low, _ in ends],
        high=[high for _, high in ends],
    )


def shape_table(signature: Signature, shape: Shape) -> pa.Table:
    """Made-up grouped rows of a shape."""
    return made_up_requests(
        signature.schema,
        signature.surface,
        candidates=[shape.candidates] * shape.requests,
        history=[shape.history] * shape.requests,
    )


class _Measured:
    """The runs of one shape, turn after turn."""

    def __init__(self, scorer: Scorer, graph: Program, shape: Shape) -> None:
        self.scorer, self.graph, self.shape = scorer, graph, shape
        self.table = shape_table(scorer.signature, shape)
        block = to_requests(self.table, scorer.signature, "the profile's rows").block
        self.device = scorer.program.device
        self.tensors = {n: t.to(self.device) for n, t in scorer.signature.tensors.tensors(block).items()}
        self.whole: list[np.ndarray] = []
        self.alone: list[np.ndarray] = []
        self.processor_s, self.runs = 0.0, 0

    def turn(self, *, repeats: int, seconds: float, precision: float) -> None:
        """Measure the whole scorer and then the program alone, some more times."""
        begun = time.process_time()
        self.whole.append(times(self._score, repeats=repeats, seconds=seconds, precision=precision))
        self.processor_s += time.process_time() - begun
        self.alone.append(times(self._program, repeats=repeats, seconds=seconds, precision=precision))

    def result(self) -> dict[str, object]:
        """What `profile` says of the shape."""
        whole = np.concatenate(self.whole)
        rate, total = 1000 / float(whole.mean()), self.shape.requests * self.shape.candidates
        return {
            **asdict(self.shape),
            "runs": whole.size,
            "turns": len(self.whole),
            "score_ms": _summary(self.whole),
            "program_ms": _summary(self.alone),
            "requests_per_second": self.shape.requests * rate,
            "candidates_per_second": total * rate,
            "seconds_per_thousand_candidates": 1 / rate / total * 1000,
            "processor_seconds_per_thousand_candidates": self.processor_s / self.runs / total * 1000,
            "flops": flops(lambda: self.graph(self.tensors)),
            "bytes_read": _bytes_read(self.graph, self.tensors),
            "peak_mb": peak_bytes(lambda: self.graph(self.tensors), self.device) / 1e6,
        }

    def _score(self) -> None:
        self.runs += 1
        self.scorer.score(self.table)

    def _program(self) -> None:
        with torch.inference_mode():
            self.scorer.program(self.tensors)
            if self.device.type == "cuda":
                torch.cuda.synchronize()


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


def _summary(turns: list[np.ndarray]) -> dict[str, object]:
    """Percentiles and mean of milliseconds over all turns, each with its least and largest turn."""
    kinds: dict[str, Callable[..., Any]] = {f"p{p}": partial(np.percentile, q=p) for p in PERCENTILES}
    kinds["mean"] = np.mean
    values = {name: float(of(np.concatenate(turns))) for name, of in kinds.items()}
    # The value itself, because interpolation may put a percentile of all just past that of every turn.
    ends = {name: [values[name], *(float(of(turn)) for turn in turns)] for name, of in kinds.items()}
    return {**values, "intervals": {name: [min(of), max(of)] for name, of in ends.items()}}
