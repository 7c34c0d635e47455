"""What models cost to serve, timed in turn in one process, so that what slows the machine slows them all.

Processor time of this thread, not wall time: other processes of the machine take the one and not the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import numpy as np
import pyarrow as pa

from pipeline.data.logs import Dataset
from pipeline.errors import DataError
from pipeline.rollout.costs import CostProfile
from pipeline.rollout.measurements import CostMeasurements
from pipeline.schema import HISTORY_TIME_MS
from pipeline.serve.example import made_up_requests
from pipeline.serve.measure import one_thread, percentile_interval
from pipeline.serve.parity import held_out
from pipeline.serve.scorer import Scorer

Name = TypeVar("Name", bound=Hashable)
REQUESTS = 16
ROUNDS = 30
_WARM_UP = 3
_SAMPLE = 20_000


def mean_shape(dataset: Dataset, surface: str, days: tuple[str, ...]) -> tuple[int, int]:
    """Mean numbers of candidates and of history events of a request, rounded, of rows spread over the days."""
    rows = held_out(dataset, surface, days, _SAMPLE)
    candidates = pa.compute.mean(pa.compute.list_value_length(rows[dataset.schema.tasks[0]])).as_py()
    history = 0.0
    if dataset.schema.has_history:
        history = pa.compute.mean(pa.compute.list_value_length(rows[HISTORY_TIME_MS])).as_py()
    if not candidates:
        raise DataError(f"the requests of surface {surface!r} hold no candidates", file=str(dataset.root))
    return max(1, round(candidates)), round(history)


def batch(scorer: Scorer, *, candidates: int, history: int, broadcast: bool = True) -> Callable[[], object]:
    """One batch of `REQUESTS` requests to score, again and again.

    Args:
        scorer: of the surface.
        candidates, history: of each request; a history is cut to what the artifact reads.
        broadcast: False sends each candidate as a request of its own, which is what serving costs without
            request-level broadcasting.
    """
    signature = scorer.signature
    requests, per_request = (REQUESTS, candidates) if broadcast else (REQUESTS * candidates, 1)
    table = made_up_requests(
        signature.schema,
        signature.surface,
        candidates=[per_request] * requests,
        history=[min(history, signature.history_length)] * requests,
    )
    return lambda: scorer.score(table)


def time_in_turn(models: Mapping[Name, Callable[[], object]], *, rounds: int = ROUNDS) -> dict[Name, np.ndarray]:
    """Milliseconds of each model's batch in each round, [rounds]; in every round each model runs once."""
    times: dict[Name, list[float]] = {name: [] for name in models}
    with one_thread():
        for run in models.values():
            for _ in range(_WARM_UP):
                run()
        for _ in range(rounds):
            for name, run in models.items():
                start = time.thread_time()
                run()
                times[name].append((time.thread_time() - start) * 1000)
    return {name: np.array(of) for name, of in times.items()}


def cost_profile(times: np.ndarray, *, candidates: int, history: int) -> CostProfile:
    """The profile of a model's times."""
    return CostProfile(
        candidates=candidates,
        history=history,
        requests=REQUESTS,
        ms=float(np.median(times)) / REQUESTS,
        p99_ms=float(np.percentile(times, 99)),
    )


def cost_measurements(times: np.ndarray, separate: np.ndarray, champion: np.ndarray) -> CostMeasurements:
    """What the gates want to know of a model's times, beside those of the separate model and the champion."""
    ms = float(np.median(times)) / REQUESTS
    ratio = times / separate
    return CostMeasurements(
        ms=ms,
        p99_ms=float(np.percentile(times, 99)),
        requests_per_second=1000 / ms,
        over_separate=float(np.median(ratio)),
        over_champion=float(np.median(times / champion)),
        ms_interval=percentile_interval(times / REQUESTS, 50),
        over_separate_interval=percentile_interval(ratio, 50),
    )
