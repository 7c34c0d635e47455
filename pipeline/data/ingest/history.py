"""What was known at a request: slices of sorted events, and the history lists made from them."""

from __future__ import annotations

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.data.ingest.events import label
from pipeline.data.ingest.spec import IngestSpec
from pipeline.errors import DataError
from pipeline.schema import HISTORY_ACTION, HISTORY_SURFACE, HISTORY_TIME_MS


class Timeline:
    """Events sorted by (group, time), asked for what lies strictly before a time.

    Args:
        group: int64, codes of the groups, rising.
        time: int64, milliseconds, rising within a group.

    Raises:
        DataError: times and groups together do not fit 63 bits.
    """

    def __init__(self, group: np.ndarray, time: np.ndarray) -> None:
        self.groups, self._starts = np.unique(group, return_index=True)
        self._ends = np.append(self._starts[1:], group.size)
        self._origin = int(time.min()) if time.size else 0
        self._span = (int(time.max()) - self._origin if time.size else 0) + 2
        if self.groups.size * self._span >= 2**63:
            raise DataError(f"{self.groups.size} groups over {self._span} ms are too many for one bucket")
        dense = np.repeat(np.arange(self.groups.size), self._ends - self._starts)
        self._key = dense * self._span + (time - self._origin)

    def before(self, group: np.ndarray, until: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each question the slice [start, end) of its group's events with time < until."""
        if not self.groups.size:
            zero = np.zeros(group.size, np.int64)
            return zero, zero
        dense = np.minimum(np.searchsorted(self.groups, group), self.groups.size - 1)
        offset = np.clip(until - self._origin, 0, self._span - 1)
        end = np.searchsorted(self._key, dense * self._span + offset, side="left")
        start = self._starts[dense]
        known = self.groups[dense] == group
        return np.where(known, start, 0), np.where(known, np.maximum(end, start), 0)


def ranges(start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and flat positions of slices laid one after another.

    >>> ranges(np.array([3, 0]), np.array([5, 1]))
    (array([0, 2, 3]), array([3, 4, 0]))
    """
    lengths = end - start
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    flat = np.arange(offsets[-1]) + np.repeat(start - offsets[:-1], lengths)
    return offsets, flat


def action_codes(spec: IngestSpec, events: pl.DataFrame) -> np.ndarray:
    """0 where no task was observed, else 1 + sum of 2**t over the tasks with an outcome of at least 0.5."""
    observed = np.zeros(len(events), bool)
    code = np.ones(len(events), np.int64)
    for t, task in enumerate(spec.tasks):
        outcome = events[label(task)].cast(pl.Float32).to_numpy()
        observed |= ~np.isnan(outcome)
        code += (np.nan_to_num(outcome) >= 0.5).astype(np.int64) << t
    return np.where(observed, code, 0).astype(np.int8)


class HistoryBuilder:
    """History lists of the requests of one bucket.

    Args:
        spec: the ingest spec.
        events: as `prepare` makes them.
        earlier: as `prepare_earlier` makes them, or None. May hold columns `action` and `surface_code`
            (events of a former ingest); else both are 0, unknown.
    """

    def __init__(self, spec: IngestSpec, events: pl.DataFrame, earlier: pl.DataFrame | None) -> None:
        assert spec.history is not None
        self._length = spec.history.length
        self._delay = spec.delay_ms
        if "_in_history" in events.columns:
            events = events.filter(pl.col("_in_history"))
        whole = events.select(
            "_user",
            "_time",
            *(pl.col(feature).alias(name) for name, feature in spec.history.features.items()),
            pl.Series("_action", action_codes(spec, events)),
            pl.col("_code").alias("_surface_code"),
        ).with_columns(pl.lit(1, dtype=pl.Int8).alias("_late"))
        if earlier is not None and len(earlier):
            zero = pl.lit(0, dtype=pl.Int8)
            extra = [zero.alias(c) for c in ("_action", "_surface_code", "_late") if c not in earlier.columns]
            whole = pl.concat([earlier.with_columns(extra).select(whole.columns), whole])
        self._events = whole.sort("_user", "_time", "_late", maintain_order=True)
        self._timeline = Timeline(self._events["_user"].to_numpy(), self._events["_time"].to_numpy())
        self._names = dict.fromkeys(spec.history.features)

    def lists(self, user: np.ndarray, time: np.ndarray) -> dict[str, pa.Array]:
        """The history columns of requests: the newest `length` events with time < request time - delay."""
        start, end = self._timeline.before(user, time - self._delay)
        offsets, flat = ranges(np.maximum(start, end - self._length), end)
        rows = self._events[flat]
        values = {name: rows[name].to_numpy().astype(np.int64) for name in self._names}
        values[HISTORY_ACTION] = rows["_action"].to_numpy()
        values[HISTORY_SURFACE] = rows["_surface_code"].to_numpy()
        values[HISTORY_TIME_MS] = rows["_time"].to_numpy()
        at = pa.array(offsets.astype(np.int32))
        return {name: pa.ListArray.from_arrays(at, pa.array(v)) for name, v in values.items()}

    def state(self, until: int) -> pl.DataFrame:
        """What the next ingest needs as `earlier`: the newest events before a time, and earlier ones after it."""
        return newest_before(self._events, self._timeline, until, self._length)


def newest_before(events: pl.DataFrame, timeline: Timeline, until: int, length: int) -> pl.DataFrame:
    """Each user's newest events before a time, and those later ones that are not of the log (`_late` = 0)."""
    users = np.unique(events["_user"].to_numpy())
    start, end = timeline.before(users, np.full(users.size, until))
    _, flat = ranges(np.maximum(start, end - length), end)
    kept = [events[flat], events.filter((pl.col("_late") == 0) & (pl.col("_time") >= until))]
    return pl.concat(kept).drop("_late")
