"""Causal label features: what the earlier outcomes of a key said when the request came.

A key is a user, an author, a user and an author, ... Every event that has the key counts for it; a request
at time t asks what was known before t - label delay. Residuals are outcomes less the surface's base rate as
known at the event's own time, so that a rate can be compared across surfaces; they are summed as whole
numbers, so that batch and increments, and any cut into buckets, give the very same bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import polars as pl
from scipy.signal import lfilter

from pipeline.data.ingest.base import BaseRates, prefix
from pipeline.data.ingest.events import label
from pipeline.data.ingest.history import Timeline
from pipeline.data.ingest.ids import UNKNOWN, list_parts
from pipeline.data.ingest.spec import IngestSpec, Rate
from pipeline.schema import Level

_LONG = 512  # entries of a group from which on it is smoothed by itself
RESIDUAL_ONE = 1 << 30  # a residual of 1 in the sums


def with_residuals(spec: IngestSpec, events: pl.DataFrame, base: BaseRates) -> pl.DataFrame:
    """Prepared events with `_r_T`, each task's residual as a whole number, null where not observed."""
    surface, until = events["_surface"].to_numpy(), events["_time"].to_numpy() - spec.delay_ms
    columns = []
    for i, task in enumerate(spec.tasks):
        residual = events[label(task)].cast(pl.Float64).to_numpy() - base.known(surface, until, i)
        whole = np.rint(np.nan_to_num(residual) * RESIDUAL_ONE).astype(np.int64)
        columns.append(pl.Series(f"_r_{i}", whole).set(pl.Series(np.isnan(residual)), None))
    return events.with_columns(columns)


def tasks_of(spec: IngestSpec, tasks: list[str] | None) -> list[int]:
    """Indices of the tasks of a causal feature."""
    names = list(spec.tasks)
    return [names.index(t) for t in (names if tasks is None else tasks)]


def rate_columns(spec: IngestSpec, rate: Rate) -> list[str]:
    """Names of the features of a rate, in order."""
    names = list(spec.tasks)
    found: list[str] = []
    for s in rate.statistics:
        per_task = s in ("rate", "ewma", "last")
        found += (
            [f"{rate.name}_{s}_{names[t]}" for t in tasks_of(spec, rate.tasks)] if per_task else [f"{rate.name}_{s}"]
        )
    return found


def rate_level(spec: IngestSpec, rate: Rate) -> Level:
    """Request level unless a key is a candidate's."""
    features = [spec.feature(k) for k in rate.keys if k not in ("user", "surface")]
    return Level.CANDIDATE if any(f.level == "candidate" for f in features) else Level.REQUEST


def crosses_users(rate: Rate) -> bool:
    """Whether events of other users count, so that a user's bucket does not hold all of them."""
    return "user" not in rate.keys


def key_columns(rate: Rate) -> list[str]:
    """Columns of a rate's keys in its entries."""
    return [f"_key_{k}" for k in rate.keys]


def entries(spec: IngestSpec, rate: Rate, events: pl.DataFrame) -> pl.DataFrame:
    """One row an event and key: what the rate needs of prepared events, and who asks.

    Events without a key (null or unknown) have no entry. A multi-valued key has one entry a value.

    Returns:
        `_row` (place in `events`), the keys, `_user`, `_time`, `_now` (time of the request, -1 where the
        event is no candidate), and per task `_r_T` and `_y_T`.
    """
    columns: dict[str, pl.Series] = {"_row": pl.Series(np.arange(len(events), dtype=np.int64))}
    multi: str | None = None
    for key, column in zip(rate.keys, key_columns(rate), strict=True):
        if key in ("user", "surface"):
            columns[column] = events["_" + key].cast(pl.Int64)
        else:
            columns[column] = events[key]
            multi = column if spec.feature(key).is_multi else multi
    now = np.where(events["_request"].to_numpy() >= 0, events["_request_time"].to_numpy(), -1)
    columns |= {"_user": events["_user"], "_time": events["_time"], "_now": pl.Series(now)}
    for t in tasks_of(spec, rate.tasks):
        columns[f"_r_{t}"] = events[f"_r_{t}"]
        columns[f"_y_{t}"] = events[label(list(spec.tasks)[t])]
    frame = pl.DataFrame({c: v for c, v in columns.items() if c != multi})
    if multi is not None:
        offsets, values = list_parts(columns[multi])
        frame = frame[np.repeat(np.arange(len(events)), np.diff(offsets))].with_columns(values.alias(multi))
    for key, column in zip(rate.keys, key_columns(rate), strict=True):
        keep = pl.col(column).is_not_null()
        if key not in ("user", "surface"):
            vocabulary = spec.vocabularies.get(spec.feature(key).vocabulary or "")
            if vocabulary is not None and vocabulary.method != "given":
                keep = keep & (pl.col(column) != UNKNOWN)
        frame = frame.filter(keep)
    return frame if multi is None else frame.unique(["_row", *key_columns(rate)])  # a value named twice counts once


def ewma(values: np.ndarray, start: np.ndarray, initial: np.ndarray, weight: float) -> np.ndarray:
    """s <- (1 - weight) s + weight x along each group; NaN changes nothing.

    Args:
        values: of all groups, one group after another.
        start: where each group begins.
        initial: s before each group's first value.

    >>> ewma(np.array([1.0, np.nan, 1.0, 4.0]), np.array([0, 3]), np.array([0.0, 2.0]), 0.5)
    array([0.5 , 0.5 , 0.75, 3.  ])
    """
    length = np.diff(np.append(start, values.size))
    out = np.empty(values.size)
    for g in np.flatnonzero(length > _LONG):  # few, and each worth a call of its own
        own = slice(start[g], start[g] + length[g])
        seen = ~np.isnan(values[own])
        first = np.array([(1.0 - weight) * initial[g]])
        smoothed, _ = lfilter([weight], [1.0, weight - 1.0], values[own][seen], zi=first)
        out[own] = np.append(initial[g], smoothed)[np.cumsum(seen)]
    short = np.flatnonzero(length <= _LONG)
    short = short[np.argsort(-length[short], kind="stable")]
    start, length, state = start[short], length[short], initial[short]
    # One pass for the first entries of all groups, one for the second ones, ...
    for step in range(int(length[0]) if length.size else 0):
        at = start[: int(np.searchsorted(-length, -step, side="left"))] + step
        state = state[: at.size]
        state = np.where(np.isnan(values[at]), state, (1.0 - weight) * state + weight * values[at])
        out[at] = state
    return out


@dataclass(frozen=True)
class Carried:
    """What is known of each group before the first entry; arrays over groups, zeros and nulls if new."""

    events: np.ndarray
    time: np.ndarray
    sums: dict[int, np.ndarray]
    counts: dict[int, np.ndarray]
    ewma: dict[int, np.ndarray]
    last: dict[int, np.ndarray]

    @staticmethod
    def of(groups: pl.DataFrame, state: pl.DataFrame | None, tasks: Iterable[int]) -> Carried:
        """The rows of a saved state for the given groups (one row a group, key columns only)."""
        n = len(groups)
        found = (
            groups.join(state, on=groups.columns, how="left", maintain_order="left", nulls_equal=True)
            if state is not None
            else groups
        )

        def column(name: str, missing: float, kind: type) -> np.ndarray:
            if name not in found.columns:
                return np.full(n, missing, kind)
            return found[name].fill_null(missing).to_numpy().astype(kind)

        return Carried(
            column("events", 0, np.int64),
            column("time", -1, np.int64),
            {t: column(f"sum_{t}", 0, np.int64) for t in tasks},
            {t: column(f"count_{t}", 0, np.int64) for t in tasks},
            {t: column(f"ewma_{t}", 0.0, np.float64) for t in tasks},
            {t: column(f"last_{t}", np.nan, np.float64) for t in tasks},
        )


class RateTable:
    """Entries of one rate, ready to be asked what was known of a group before a time.

    Args:
        spec, rate: what to make.
        frame: as `entries` makes them; all entries of every group in it.
        state: what an earlier ingest left, for groups of this bucket.
    """

    def __init__(self, spec: IngestSpec, rate: Rate, frame: pl.DataFrame, state: pl.DataFrame | None = None) -> None:
        self.rate, self._keys = rate, key_columns(rate)
        self._delay = spec.delay_ms
        self.tasks = tasks_of(spec, rate.tasks)
        self._names = list(spec.tasks)
        # Events of one time are told apart by user and row: a fixed order, whatever the buckets.
        self.frame = frame.sort([*self._keys, "_time", "_user", "_row"])
        keys = self.frame.select(self._keys)
        group = keys.select(pl.struct(pl.all()).rle_id()).to_series().to_numpy().astype(np.int64) if len(keys) else None
        self.group = np.zeros(0, np.int64) if group is None else group
        self.time = self.frame["_time"].to_numpy()
        self.timeline = Timeline(self.group, self.time)
        self.groups = keys[np.flatnonzero(np.diff(self.group, prepend=-1))]
        self._carried = Carried.of(self.groups, state, self.tasks)
        self._sums: dict[int, np.ndarray] = {}
        self._counts: dict[int, np.ndarray] = {}
        self._ewma: dict[int, np.ndarray] = {}
        self._last: dict[int, np.ndarray] = {}
        for t in self.tasks:
            residual = self.frame[f"_r_{t}"]
            self._sums[t] = prefix(residual.fill_null(0).to_numpy())
            self._counts[t] = prefix(residual.is_not_null().to_numpy().astype(np.int64))
            if "ewma" in rate.statistics:
                self._ewma[t] = self._recursion(t)
            if "last" in rate.statistics:
                self._last[t] = self._newest_observed(t)

    def _recursion(self, t: int) -> np.ndarray:
        """EWMA after each entry; a group starts from what is carried, or 0; unobserved entries change nothing."""
        residual = self.frame[f"_r_{t}"].cast(pl.Float64).to_numpy() / RESIDUAL_ONE
        start = np.flatnonzero(np.diff(self.group, prepend=-1))
        return ewma(residual, start, self._carried.ewma[t], self.rate.ewma_weight)

    def _newest_observed(self, t: int) -> np.ndarray:
        """Outcome of the newest observed entry of the group up to each entry; what is carried if none."""
        values = self.frame[f"_y_{t}"].cast(pl.Float64).to_numpy()
        start = np.flatnonzero(np.diff(self.group, prepend=-1))
        observed = np.maximum.accumulate(np.where(np.isnan(values), -1, np.arange(values.size)))
        own = observed >= start[self.group] if values.size else np.zeros(0, bool)
        return np.where(own, values[np.maximum(observed, 0)], self._carried.last[t][self.group])

    def known(self, group: np.ndarray, until: np.ndarray) -> dict[str, np.ndarray]:
        """State of groups before times: events, time (-1 = never), and per task sum, count, ewma and last."""
        start, end = self.timeline.before(group, until)
        some = end > start
        newest = np.maximum(end - 1, 0)
        carried = self._carried

        def at(values: np.ndarray, before: np.ndarray) -> np.ndarray:
            return np.where(some, values[newest], before[group]) if values.size else before[group]

        out = {"events": end - start + carried.events[group], "time": at(self.time, carried.time)}
        for t in self.tasks:
            out[f"sum_{t}"] = self._sums[t][end] - self._sums[t][start] + carried.sums[t][group]
            out[f"count_{t}"] = self._counts[t][end] - self._counts[t][start] + carried.counts[t][group]
            if t in self._ewma:
                out[f"ewma_{t}"] = at(self._ewma[t], carried.ewma[t])
            if t in self._last:
                out[f"last_{t}"] = at(self._last[t], carried.last[t])
        return out

    def answers(self) -> pl.DataFrame:
        """What was known for each candidate and key: `_bucket` if the frame has it, `_row`, keys, `_now`, state."""
        asks = np.flatnonzero(self.frame["_now"].to_numpy() >= 0)
        identity = [c for c in ("_bucket", "_row") if c in self.frame.columns]
        who = self.frame.select(*identity, *self._keys, "_now")[asks]
        known = self.known(self.group[asks], who["_now"].to_numpy() - self._delay)
        return who.with_columns(pl.Series(c, v) for c, v in known.items())

    def state(self, until: int, before: pl.DataFrame | None) -> pl.DataFrame:
        """What is known of every group before a time, to carry to the next ingest."""
        group = np.arange(len(self.groups))
        known = self.known(group, np.full(group.size, until))
        new = self.groups.with_columns(pl.Series(c, v) for c, v in known.items()).filter(pl.col("events") > 0)
        if before is None:
            return new
        return pl.concat([before.join(self.groups, on=self._keys, how="anti"), new.select(before.columns)])


def pool(spec: IngestSpec, rate: Rate, answers: pl.DataFrame) -> pl.DataFrame:
    """The features of each candidate from its answers: `_row` and one float32 column a feature.

    Several keys of one candidate (its tags) go together: sums add, EWMA is the mean, last the newest.
    """
    tasks = tasks_of(spec, rate.tasks)
    newest = pl.col("time") == pl.col("time").max()
    if any(spec.feature(k).is_multi for k in rate.keys if k not in ("user", "surface")):
        answers = (
            answers.sort("_row", *key_columns(rate))
            .group_by("_row", maintain_order=True)
            .agg(
                pl.col("_now").first(),
                *(pl.col(f"last_{t}").filter(newest).fill_nan(None).mean() for t in tasks if "last" in rate.statistics),
                pl.col("events").sum(),
                *(pl.col(f"{c}_{t}").sum() for t in tasks for c in ("sum", "count")),
                *(pl.col(f"ewma_{t}").mean() for t in tasks if "ewma" in rate.statistics),
                pl.col("time").max(),
            )
        )
    return answers.select("_row", *_expressions(spec, rate, tasks))


def _expressions(spec: IngestSpec, rate: Rate, tasks: list[int]) -> list[pl.Expr]:
    names = list(spec.tasks)
    found: list[pl.Expr] = []
    for s in rate.statistics:
        if s == "count":
            found.append(pl.col("events").log1p().alias(f"{rate.name}_count"))
        elif s == "recency":
            seconds = (pl.col("_now") - pl.col("time")) / 1000.0
            found.append(pl.when(pl.col("time") >= 0).then(seconds.log1p()).alias(f"{rate.name}_recency"))
        else:
            for t in tasks:
                shrunk = pl.col(f"sum_{t}") / RESIDUAL_ONE / (pl.col(f"count_{t}") + rate.strength)
                value = shrunk if s == "rate" else pl.col(f"{s}_{t}").fill_nan(None)
                found.append(value.alias(f"{rate.name}_{s}_{names[t]}"))
    return [e.cast(pl.Float32) for e in found]


def place(features: pl.DataFrame, rows: int) -> list[pl.Series]:
    """Columns of length `rows` with the features at their `_row`, null elsewhere."""
    at = features["_row"].to_numpy()
    found = []
    for name in features.columns:
        if name != "_row":
            values = np.full(rows, np.nan, np.float32)
            values[at] = features[name].fill_null(np.nan).to_numpy()
            found.append(pl.Series(name, values).fill_nan(None))
    return found
