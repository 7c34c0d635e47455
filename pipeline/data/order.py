"""The global order: which requests form which batch, as a pure function of (sizes, seed, epoch).

Two parts. `Schedule` says how many requests each surface gives to each step. `SurfaceOrder` says which
request stands at which position of a surface's epoch, and which rank holds it. Neither touches a file:
row counts from the Parquet footers are enough, so every rank knows every step before the first one.

How a surface is shuffled. Its row groups are put in random order and seen as one long virtual column of
N rows. This is cut in `lanes` contiguous pieces of equal length (to one row). Position p of the epoch is
row p // lanes of lane p % lanes, so that a batch draws from all over the data; within a lane, rows are
shuffled in windows. A rank owns the lanes l with l % world_size == rank and reads only their row groups.
The order does not depend on the number of ranks, memory is bounded by the windows, and any position can be
found without replaying what came before it.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np

from pipeline.config import Exhaustion
from pipeline.errors import ConfigError, unknown


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How many requests each surface gives to each step of an epoch.

    After k steps a surface has given floor(k * rate) requests, so each step takes the same share to one
    request. The batch size holds to within one request a surface.

    Args:
        sizes: requests of each surface in an epoch.
        requests_per_batch: requests of one global batch, over all ranks.
        weights: share of each surface in a batch; None is the natural share, with which all surfaces end
            at the same step.
        exhaustion: when a surface runs out first: "stop" ends the epoch there (the rest is not seen),
            "drop_out" goes on without it until all have run out, "repeat" starts it again in a new order
            until the last one has run out, whose last batch is filled from its next pass.

    Raises:
        ConfigError: the batch is empty, weights are not positive or name other surfaces.
    """

    sizes: Mapping[str, int]
    requests_per_batch: int
    weights: Mapping[str, float] | None = None
    exhaustion: Exhaustion = "drop_out"

    def __post_init__(self) -> None:
        if self.requests_per_batch < 1:
            raise ConfigError(f"requests_per_batch is {self.requests_per_batch}; a batch needs at least one request")
        for name, weight in (self.weights or {}).items():
            if name not in self.sizes:
                raise ConfigError("surface weights: " + unknown("surface", name, self.sizes))
            if not weight > 0:
                raise ConfigError(f"surface weight of {name!r} is {weight}; it must be positive")
        if self.weights is not None and (missing := [s for s in self.sizes if s not in self.weights]):
            raise ConfigError(f"surface weights lack {', '.join(missing)}; name every surface of the run")

    @cached_property
    def _rates(self) -> dict[str, Fraction]:
        total = sum(self.sizes.values())
        if self.weights is None:
            steps = -(-total // self.requests_per_batch)
            return {s: Fraction(n, max(steps, 1)) for s, n in self.sizes.items()}
        live = {s: Fraction(self.weights[s]).limit_denominator(10**6) for s, n in self.sizes.items() if n}
        whole = sum(live.values())
        return {s: self.requests_per_batch * live.get(s, Fraction(0)) / (whole or 1) for s in self.sizes}

    def _given(self, surface: str, steps: int) -> int:
        rate = self._rates[surface]
        return steps * rate.numerator // rate.denominator

    @cached_property
    def steps(self) -> int:
        """Steps of the epoch, the same on every rank."""
        ends = []
        for surface, size in self.sizes.items():
            if size == 0:
                continue
            rate = self._rates[surface]
            # The first step count after which the surface has given all its requests.
            last = -(-size * rate.denominator // rate.numerator)
            # "stop" leaves out a step that the surface could not fill.
            ends.append(last - (self.exhaustion == "stop" and self._given(surface, last) > size))
        if not ends:
            return 0
        return min(ends) if self.exhaustion == "stop" else max(ends)

    def span(self, surface: str, step: int) -> tuple[int, int]:
        """Positions [start, stop) that a surface gives to a step; with "repeat" they run on past the size."""
        start, stop = self._given(surface, step), self._given(surface, step + 1)
        if self.exhaustion == "repeat":
            return start, stop
        size = self.sizes[surface]
        return min(start, size), min(stop, size)


def natural_weights(sizes: Mapping[str, int], temperature: float) -> dict[str, float]:
    """Shares proportional to size ** (1 / temperature): 1 is natural, larger evens surfaces out.

    Raises:
        ConfigError: the temperature is not positive.
    """
    if not temperature > 0:
        raise ConfigError(f"temperature is {temperature}; it must be positive")
    return {s: float(n) ** (1 / temperature) for s, n in sizes.items() if n}


@dataclass(frozen=True, kw_only=True)
class SurfaceOrder:
    """The order of one surface's requests in one epoch. See the module's text.

    Args:
        surface: its name, part of the seed.
        unit_rows: requests of each row group, in the data set's order.
        seed: of the run.
        epoch: of the run.
        repeat: counts the passes over the surface within an epoch.
        lanes: pieces that the epoch is cut in; at least the number of ranks. Part of the order.
        window: rows of a lane that are shuffled together. Part of the order.
        shuffle: False keeps row groups and rows as they lie.
    """

    surface: str
    unit_rows: tuple[int, ...]
    seed: int
    epoch: int
    lanes: int
    window: int
    repeat: int = 0
    shuffle: bool = True

    @cached_property
    def size(self) -> int:
        return sum(self.unit_rows)

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.Generator(
            np.random.Philox(
                np.random.SeedSequence([self.seed, zlib.crc32(self.surface.encode()), self.epoch, self.repeat, *key])
            )
        )

    @cached_property
    def units(self) -> np.ndarray:
        """Row groups in the order of the virtual column."""
        count = len(self.unit_rows)
        return self._generator(0).permutation(count) if self.shuffle else np.arange(count)

    @cached_property
    def unit_starts(self) -> np.ndarray:
        """Virtual row at which each entry of `units` starts, and the end."""
        return np.concatenate([[0], np.cumsum(np.asarray(self.unit_rows, dtype=np.int64)[self.units])])

    def lane_span(self, lane: int) -> tuple[int, int]:
        """Virtual rows [start, stop) of a lane."""
        whole, rest = divmod(self.size, self.lanes)
        start = lane * whole + min(lane, rest)
        return start, start + whole + (lane < rest)

    def window_rows(self, lane: int, window: int) -> np.ndarray:
        """Virtual rows of a lane's window, in the order of the epoch. int64 [<= window]."""
        start, stop = self.lane_span(lane)
        rows = np.arange(start + window * self.window, min(start + (window + 1) * self.window, stop), dtype=np.int64)
        # Past the lane's end there is nothing to shuffle, and making a generator is most of the work.
        return self._generator(1, lane, window).permutation(rows) if self.shuffle and rows.size else rows

    def block_rows(self, block: int, rank: int, world_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions and virtual rows of what a rank holds of a block, in order of position.

        A block is the same window of every lane: positions [block * lanes * window, (block + 1) * lanes * window).
        """
        own = np.arange(rank, self.lanes, world_size)
        rows = [self.window_rows(lane, block) for lane in own.tolist()]
        index = block * self.window + np.concatenate([np.arange(r.size) for r in rows] or [np.empty(0, np.int64)])
        positions = index * self.lanes + np.repeat(own, [r.size for r in rows])
        order = np.argsort(positions, kind="stable")
        return positions[order], np.concatenate(rows or [np.empty(0, np.int64)])[order]

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row group (index in `unit_rows`) and row within it, of virtual rows."""
        slot = np.searchsorted(self.unit_starts, rows, side="right") - 1
        return self.units[slot], rows - self.unit_starts[slot]
