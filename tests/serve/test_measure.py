"""What measures others is held against known values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.errors import ArtifactError
from pipeline.serve.bound import Budget, sweep
from pipeline.serve.measure import half_interval, peak_bytes, percentile_interval, times
from pipeline.serve.pruning import flops
from pipeline.serve.scorer import Scorer

CPU = torch.device("cpu")


def test_peak_bytes_by_hand() -> None:
    """1000 floats, twice as many beside them, the first ones gone before the last: 3000 floats at once."""

    def run() -> torch.Tensor:
        first = torch.ones(1000)
        second = torch.cat([first, first])
        view = second[:10]
        del first, second
        return view + 1

    assert peak_bytes(run, CPU) == 12_000


def test_peak_bytes_leaves_out_what_was_there() -> None:
    weights = torch.ones(10_000)
    assert peak_bytes(lambda: weights[:100] + 1, CPU) == 400


def test_flops_by_hand() -> None:
    """[2, 3] x [3, 4]: 24 multiplications with additions; attention of 5 queries over 7 keys of width 8, twice 280."""
    a, b = torch.ones(2, 3), torch.ones(3, 4)
    assert flops(lambda: a @ b) == 48
    q, k = torch.ones(1, 1, 5, 8), torch.ones(1, 1, 7, 8)
    assert flops(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, k)) == 2 * 2 * 5 * 7 * 8


def test_intervals() -> None:
    values = np.arange(1.0, 1001.0)
    assert percentile_interval(values, 50) == (470.0, 532.0)  # 500 -+ 1.96 * sqrt(1000 / 4), outwards
    assert percentile_interval(np.array([3.0]), 99) == (3.0, 3.0)
    few = np.arange(7.0)
    low, high = percentile_interval(few, 99)
    assert low <= np.percentile(few, 99) <= high == 6
    assert half_interval(values) == pytest.approx(1.96 * values.std(ddof=1) / 1000**0.5)
    assert half_interval(np.array([1.0])) == float("inf")


def test_a_precise_measurement_stops_early() -> None:
    runs = times(lambda: sum(range(2000)), repeats=5000, seconds=20, precision=0.5)
    assert 30 <= runs.size < 5000


def test_the_bound_is_the_largest_within_the_budget(scorer: Scorer) -> None:
    bound, found = sweep(scorer, scorer.program, Budget(latency_ms=10_000, memory_mb=2))
    points = found["points"]
    assert isinstance(points, list)
    assert [p["requests"] for p in points] == [2**i for i in range(len(points))]
    within = [p for p in points if p["memory_mb"] <= 2]
    assert within == points[:-1], "it stops at the first beyond"
    # Memory is that of the tensors, so it grows with the requests.
    assert 1.8 < points[-1]["memory_mb"] / points[-2]["memory_mb"] < 2.2
    best = min(p["latency_ms"] / p["requests"] for p in within)
    assert bound == max(p["requests"] for p in within if p["latency_ms"] / p["requests"] <= 1.1 * best)
    with pytest.raises(ArtifactError, match=r"one request of 16 candidates takes .* MB; allow more"):
        sweep(scorer, scorer.program, Budget(memory_mb=1e-6))
