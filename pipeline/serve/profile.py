"""What serving an artifact costs: latencies and throughput over shapes of batches, on one thread.

Times are of made-up rows (`pipeline.serve.example`), whose ids are spread evenly over the tables: caches see no
popular rows, so the figures are a little worse than on real traffic. Compare figures of one machine only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch

from pipeline.data.assemble import assemble_inputs
from pipeline.errors import ConfigError
from pipeline.serve.artifact import COMPILED, ArtifactInfo, open_artifact
from pipeline.serve.example import made_up_requests
from pipeline.serve.program import serving_tensors
from pipeline.serve.rows import to_requests
from pipeline.serve.scorer import Scorer

_WARM_UP = 5
_PERCENTILES = (50, 90, 99)


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


def profile(
    artifact: str | Path | ArtifactInfo,
    *,
    requests: Sequence[int] = (1, 16),
    candidates: Sequence[int] = (1, 16, 64, 256),
    history: Sequence[int] | None = None,
    repeats: int = 200,
    seconds: float = 2.0,
) -> dict[str, object]:
    """Measure an artifact over all combinations of the given sizes.

    Args:
        artifact: its folder, or the opened artifact.
        requests: requests in a batch.
        candidates: of each request.
        history: events of each request; None takes none and as many as the artifact reads.
        repeats: measured runs of each shape, after a few that are not.
        seconds: stop a shape's runs after this time, however many were made.

    Returns:
        For JSON: the artifact, and for each shape the milliseconds of the whole scorer on an Arrow table
        (`score_ms`) and of the program alone on tensors (`program_ms`), by percentile, with candidates and
        requests per second of the whole.

    Raises:
        ArtifactError: it is missing or damaged.
        ConfigError: no size, or one that is not positive.
    """
    info = artifact if isinstance(artifact, ArtifactInfo) else open_artifact(artifact)
    longest = info.signature.history_length
    history = sorted({0, longest}) if history is None else history
    for name, sizes, least in (("requests", requests, 1), ("candidates", candidates, 1), ("history", history, 0)):
        if not sizes or min(sizes) < least:
            raise ConfigError(f"{name} is {list(sizes)}; give one or more numbers of at least {least}")
    if repeats < 1 or seconds <= 0:
        raise ConfigError(f"repeats is {repeats} and seconds {seconds:g}; both must be positive")
    scorer = Scorer.open(info)
    shapes = [
        Shape(requests=r, candidates=c, history=h)
        for r, c, h in product(requests, candidates, sorted({min(h, longest) for h in history}))
    ]
    with _one_thread():
        found = [_measure(scorer, shape, repeats, seconds) for shape in shapes]
    return {
        "surface": info.surface,
        "digest": info.digest,
        "dtype": info.signature.dtype,
        "bytes": info.bytes,
        "compiled": COMPILED in info.manifest.files,
        "threads": 1,
        "shapes": found,
    }


def _measure(scorer: Scorer, shape: Shape, repeats: int, seconds: float) -> dict[str, object]:
    signature = scorer.signature
    table = made_up_requests(
        signature.schema,
        signature.surface,
        candidates=[shape.candidates] * shape.requests,
        history=[shape.history] * shape.requests,
    )
    block = to_requests(table, signature, "the profile's rows").block
    tensors = serving_tensors(assemble_inputs({signature.surface: block}, signature.layout), signature.layout)
    whole = _times(lambda: scorer.score(table), repeats, seconds)
    with torch.inference_mode():
        program = _times(lambda: scorer.program(tensors), repeats, seconds)
    rate = 1000 / float(whole.mean())
    return {
        **asdict(shape),
        "runs": whole.size,
        "score_ms": _percentiles(whole),
        "program_ms": _percentiles(program),
        "requests_per_second": shape.requests * rate,
        "candidates_per_second": shape.requests * shape.candidates * rate,
    }


def _times(run: Callable[[], object], repeats: int, seconds: float) -> np.ndarray:
    """Milliseconds of each run."""
    for _ in range(_WARM_UP):
        run()
    out: list[float] = []
    end = time.perf_counter() + seconds
    while len(out) < repeats and (not out or time.perf_counter() < end):
        start = time.perf_counter()
        run()
        out.append((time.perf_counter() - start) * 1000)
    return np.array(out)


def _percentiles(times: np.ndarray) -> dict[str, float]:
    return {f"p{p}": float(np.percentile(times, p)) for p in _PERCENTILES}


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
