"""What the soak calls growth, on samples whose trend is known; the soak itself takes an hour (`make soak`)."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import numpy as np
import pytest

from tests.faults.soak import Sample, heap_bytes, trends


def samples(**slopes: float) -> list[Sample]:
    """Two hundred samples with noise; each named quantity grows by its slope in a thousand steps."""
    rng, still = np.random.default_rng(0), {"heap_mib": 200.0, "resident_mib": 400.0, "handles": 20, "threads": 16}
    still |= {"step_ms": 20.0, "processor_ms": 25.0}
    noise = {"heap_mib": 0.02, "resident_mib": 0.1, "handles": 0.0, "threads": 0.5, "step_ms": 3.0, "processor_ms": 2.0}
    return [
        Sample(
            step=50 * (i + 1),
            seconds=float(i),
            **{n: v + slopes.get(n, 0.0) * (i + 1) / 20 + noise[n] * rng.normal() for n, v in still.items()},  # type: ignore[arg-type]
        )
        for i in range(200)
    ]


def test_what_does_not_grow_passes() -> None:
    found = trends(samples())
    assert not any(trend.grows for trend in found.values())
    assert found["heap_mib"].low < 0 < found["heap_mib"].high


@pytest.mark.parametrize(
    ("name", "slope"),
    [("heap_mib", 0.1), ("resident_mib", 1.0), ("handles", 1.0), ("threads", 1.0), ("processor_ms", 2)],
)
def test_each_kind_of_growth_is_seen(name: str, slope: float) -> None:
    found = trends(samples(**{name: slope}))
    assert [n for n, t in found.items() if t.grows] == [name]
    assert found[name].slope == pytest.approx(slope, rel=0.25)


def test_what_happens_in_the_warm_up_does_not_count() -> None:
    """A cache that fills and then stays full is no leak."""
    filled = [replace(s, heap_mib=s.heap_mib + min(s.step / 100, 30.0)) for s in samples()]
    assert not trends(filled)["heap_mib"].grows


def test_the_heap_is_what_was_asked_for_and_not_given_back() -> None:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_info"):
        pytest.skip("malloc is not glibc's")
    libc.malloc.restype = ctypes.c_void_p
    before = heap_bytes()
    small = [ctypes.c_void_p(libc.malloc(1000)) for _ in range(5000)]
    large = ctypes.c_void_p(libc.malloc(64 << 20))
    held = heap_bytes() - before
    assert held == pytest.approx((64 << 20) + 5_000_000, rel=0.02)
    for pointer in (*small, large):
        libc.free(pointer)
    assert abs(heap_bytes() - before) < 500_000
