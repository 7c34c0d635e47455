"""Rates of earlier outcomes weighted by how alike the items are.

Vectors of items come from what users saw before the log begins (`history.earlier`), never from the log
itself: M = users x items, 1 where the user saw the item, scaled to D_u^-1/2 M D_i^-1/2; the right singular
vectors times the singular values, each to length 1. (Spectral embedding of the bipartite graph, Dhillon
2001, "Co-clustering documents and words using bipartite spectral graph partitioning".)
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import polars as pl
from scipy.sparse import coo_matrix, diags
from scipy.sparse.linalg import svds

from pipeline.data.ingest.history import Timeline, newest_before, ranges
from pipeline.data.ingest.ids import UNKNOWN
from pipeline.data.ingest.rates import RESIDUAL_ONE, tasks_of
from pipeline.data.ingest.spec import IngestSpec, Similarity
from pipeline.schema import HISTORY_ITEM

MOST_PAIRS = 5_000_000  # of user and item that vectors are made from; users beyond these are left out
_CHUNK = 200_000  # pairs of items compared at a time


def similarity_columns(spec: IngestSpec) -> list[str]:
    """Names of the features: a rate a task, the weight behind it, and the likeness to all items seen."""
    how = spec.causal.similarity
    assert how is not None
    names = list(spec.tasks)
    rates = [f"{how.name}_rate_{names[t]}" for t in tasks_of(spec, how.tasks)]
    return [*rates, f"{how.name}_weight", f"{how.name}_affinity"]


def slice_of(users: np.ndarray) -> np.ndarray:
    """A number in [0, 4096) of each user, as good as random: what to choose users by, however they are cut."""
    mixed = users.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (mixed >> np.uint64(52)).astype(np.int64)


def chosen_slices(pairs: np.ndarray) -> np.ndarray:
    """Which slices of users vectors are made from, given the pairs of each: the first ones, up to `MOST_PAIRS`."""
    return np.cumsum(pairs) - pairs < MOST_PAIRS


def item_vectors(pairs: pl.DataFrame, items: int, dimension: int) -> np.ndarray:
    """Vectors [items, dimension] of length 1; zeros for items that too few users saw to say anything.

    Args:
        pairs: `user` and `item` (id) of earlier events.
        items: size of the item vocabulary.
        dimension: of the vectors; fewer are made if the pairs do not carry that many.
    """
    pairs = pairs.filter(pl.col("item") != UNKNOWN).unique().sort("user", "item")
    vectors = np.zeros((items, dimension), np.float32)
    seen, item = np.unique(pairs["item"].to_numpy(), return_inverse=True)
    users, user = np.unique(pairs["user"].to_numpy(), return_inverse=True)
    rank = min(dimension, seen.size - 1, users.size - 1)
    if rank < 1:
        return vectors
    matrix = coo_matrix((np.ones(len(pairs)), (user, item))).tocsr()
    by_user = diags(np.asarray(matrix.sum(1)).ravel() ** -0.5)
    by_item = diags(np.asarray(matrix.sum(0)).ravel() ** -0.5)
    start = np.ones(min(matrix.shape))  # a fixed start makes the result the same every time
    _, singular, right = svds(by_user @ matrix @ by_item, k=rank, v0=start)
    found = right.T * singular
    norm = np.linalg.norm(found, axis=1, keepdims=True)
    vectors[seen, :rank] = np.where(norm > 1e-9, found / np.maximum(norm, 1e-9), 0.0)
    return vectors


class Weighted:
    """Weighted rates of the candidates of one bucket.

    Args:
        spec: the ingest spec, with `causal.similarity`.
        vectors: of the items.
        events: prepared events with residuals.
        earlier: earlier events of the bucket (`_user`, `_time`, `history_item`), newest last within a user; may
            hold `_r_T` of events of a former ingest.
    """

    def __init__(self, spec: IngestSpec, vectors: np.ndarray, events: pl.DataFrame, earlier: pl.DataFrame) -> None:
        how = spec.causal.similarity
        assert how is not None
        assert spec.history is not None
        self._how: Similarity = how
        self._delay, self._vectors = spec.delay_ms, vectors
        self._tasks = tasks_of(spec, how.tasks)
        self._item = spec.history.features[HISTORY_ITEM]
        residuals = [f"_r_{t}" for t in self._tasks]
        self._names = similarity_columns(spec)
        own = events.select("_user", "_time", pl.col(self._item).alias("item"), *residuals, _late=pl.lit(1))
        absent = [pl.lit(None, dtype=pl.Int64).alias(r) for r in residuals if r not in earlier.columns]
        before = earlier.with_columns(absent).select(
            "_user", "_time", pl.col(HISTORY_ITEM).alias("item"), *residuals, _late=pl.lit(0)
        )
        self._events = pl.concat([before, own]).sort("_user", "_time", "_late", maintain_order=True)
        self._timeline = Timeline(self._events["_user"].to_numpy(), self._events["_time"].to_numpy())

    def features(self, events: pl.DataFrame) -> list[pl.Series]:
        """One float32 column a feature, for every row of `events`; null where it is no candidate."""
        asks = np.flatnonzero(events["_request"].to_numpy() >= 0)
        asking = events[asks]
        start, end = self._timeline.before(asking["_user"].to_numpy(), asking["_request_time"].to_numpy() - self._delay)
        start = np.maximum(start, end - self._how.events)
        item = asking[self._item].to_numpy()
        out = np.zeros((len(self._names), asks.size))
        edges = np.searchsorted(np.cumsum(end - start), np.arange(0, int((end - start).sum()) + _CHUNK, _CHUNK))
        edges = np.unique(np.append(edges, [0, asks.size]))
        for low, high in pairwise(edges.tolist()):
            part = slice(low, high)
            out[:, part] = self._chunk(item[part], start[part], end[part])
        found = []
        for name, values in zip(self._names, out, strict=True):
            column = np.full(len(events), np.nan, np.float32)
            column[asks] = values
            found.append(pl.Series(name, column).fill_nan(None))
        return found

    def _chunk(self, item: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        offsets, flat = ranges(start, end)
        asking = np.repeat(np.arange(item.size), end - start)
        seen = self._events["item"].to_numpy()[flat]
        cosine = np.einsum("ij,ij->i", self._vectors[item[asking]], self._vectors[seen]).astype(np.float64)
        weight = np.maximum(cosine, 0.0) ** self._how.power
        out = []
        total = np.zeros(item.size)
        for t in self._tasks:
            residual = self._events[f"_r_{t}"].cast(pl.Float64).to_numpy()[flat] / RESIDUAL_ONE
            known = ~np.isnan(residual)
            total = _sums(np.where(known, weight, 0.0), offsets)
            summed = _sums(np.where(known, weight * np.nan_to_num(residual), 0.0), offsets)
            out.append(summed / (total + self._how.strength))
        affinity = _sums(weight, offsets) / np.maximum(np.diff(offsets), 1)
        return np.stack([*out, np.log1p(total), affinity])

    def state(self, until: int) -> pl.DataFrame:
        """The newest events of each user before a time: `_user`, `_time`, `history_item`, `_r_T`."""
        found = newest_before(self._events, self._timeline, until, self._how.events)
        return found.rename({"item": HISTORY_ITEM})


def _sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Sum of each slice, in order; 0 for an empty one."""
    row = np.repeat(np.arange(offsets.size - 1), np.diff(offsets))
    return np.bincount(row, weights=values, minlength=offsets.size - 1)
