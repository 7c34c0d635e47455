"""Times and memory of calls: what the sweep of an export, the cost profile and the benchmarks share."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WARM_UP = 5


def times(
    run: Callable[[], object],
    *,
    repeats: int,
    seconds: float,
    precision: float | None = None,
    warm_up: int = WARM_UP,
) -> np.ndarray:
    """Milliseconds of each run, after a few that are not measured.

    Args:
        run: what to measure; must wait for its own device.
        repeats: the most runs.
        seconds: stop after this time, however many were made.
        precision: stop once the 95 % interval of the mean is within this share of it, after 30 runs at least.
        warm_up: unmeasured runs.
    """
    for _ in range(warm_up):
        run()
    out: list[float] = []
    end = time.perf_counter() + seconds
    while len(out) < repeats and (not out or time.perf_counter() < end):
        start = time.perf_counter()
        run()
        out.append((time.perf_counter() - start) * 1000)
        if precision is not None and len(out) >= 30 and half_interval(np.array(out)) <= precision * np.mean(out):
            break
    return np.array(out)


def half_interval(values: np.ndarray) -> float:
    """Half the width of the 95 % interval of a mean, by the normal approximation; infinite for one value."""
    return 1.96 * float(values.std(ddof=1)) / values.size**0.5 if values.size > 1 else float("inf")


def percentile_interval(values: np.ndarray, percentile: float) -> tuple[float, float]:
    """95 % interval of a percentile from order statistics, which assumes nothing of the distribution.

    The number of values below the true percentile p of n is binomial(n, p), here by its normal approximation.
    """
    ordered, n, p = np.sort(values), values.size, percentile / 100
    half = 1.96 * (n * p * (1 - p)) ** 0.5
    # Of few values the percentile itself lies between two neighbours; the interval begins at the lower one at most.
    low = int(np.clip(np.floor(min(n * p - half, (n - 1) * p)), 0, n - 1))
    high = int(np.clip(np.ceil(n * p + half), 0, n - 1))
    return float(ordered[low]), float(ordered[high])


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most memory that a run's tensors take at once, beyond what was there before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    with _Watch() as watch, torch.no_grad():
        run()
    return watch.most


class _Watch(TorchDispatchMode):
    """Adds up the storages of tensors that operators give, while they live. Space within an operator is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.most = 0
        self._users: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor, given)
        return out

    def _hold(self, tensor: torch.Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        at, size = storage.data_ptr(), storage.nbytes()
        if at not in self._users:
            if at in given or not size:
                return  # a view of what was there before
            self.held += size
            self.most = max(self.most, self.held)
        self._users[at] = self._users.get(at, 0) + 1
        weakref.finalize(tensor, self._drop, at, size)

    def _drop(self, at: int, size: int) -> None:
        self._users[at] -= 1
        if not self._users[at]:
            del self._users[at]
            self.held -= size


@contextmanager
def one_thread() -> Iterator[None]:
    """Operators on one thread within."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
