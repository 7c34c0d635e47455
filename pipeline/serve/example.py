"""Made-up requests that fit an artifact: examples for export and MLflow, loads for the profile."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from pipeline.schema import (
    HISTORY_ACTION,
    HISTORY_SURFACE,
    HISTORY_TIME_MS,
    REQUEST_ID,
    TIMESTAMP_MS,
    DatasetSchema,
    Feature,
    Kind,
    Level,
)

# 2026-01-01; nothing depends on it, for the model sees only ages.
_NOW_MS = 1_767_225_600_000
_MOST_VALUES = 3  # of a multi-valued feature


def made_up_requests(
    schema: DatasetSchema, surface: str, *, candidates: Sequence[int], history: Sequence[int], seed: int = 0
) -> pa.Table:
    """Grouped rows with random ids and numbers.

    Args:
        schema: of the artifact.
        surface: its surface.
        candidates: number of candidates of each request.
        history: number of events of each request; left out where the schema has no history.
        seed: of the random generator.
    """
    rng = np.random.default_rng(seed)
    requests = len(candidates)
    columns: dict[str, pa.Array] = {
        REQUEST_ID: pa.array(np.arange(requests)),
        TIMESTAMP_MS: pa.array(np.full(requests, _NOW_MS)),
    }
    for f in schema.select(surface=surface):
        if f.level is Level.REQUEST:
            columns[f.name] = _values(f, schema, requests, rng)
        elif f.level is Level.CANDIDATE:
            columns[f.name] = _lists(candidates, _values(f, schema, sum(candidates), rng))
        else:
            columns[f.name] = _lists(history, _values(f, schema, sum(history), rng))
    if schema.has_history:
        events = sum(history)
        # Oldest first, a minute apart, the newest just older than the label delay.
        back = np.concatenate([np.arange(n, 0, -1) for n in history] or [np.empty(0, np.int64)])
        then = _NOW_MS - schema.label_delay_ms - back * 60_000
        columns |= {
            HISTORY_ACTION: _lists(history, pa.array(rng.integers(0, schema.action_count, events), pa.int8())),
            HISTORY_SURFACE: _lists(history, pa.array(rng.integers(0, 1 + len(schema.surfaces), events), pa.int8())),
            HISTORY_TIME_MS: _lists(history, pa.array(then, pa.int64())),
        }
    return pa.table(columns)


def _values(f: Feature, schema: DatasetSchema, rows: int, rng: np.random.Generator) -> pa.Array:
    if f.kind is Kind.NUMERIC:
        return pa.array(rng.normal(size=rows).astype(np.float32))
    size = schema.vocabulary(f.vocabulary or "").size
    if not f.multi_valued:
        return pa.array(rng.integers(0, size, rows))
    lengths = rng.integers(1, _MOST_VALUES + 1, rows)
    return _lists(lengths.tolist(), pa.array(rng.integers(0, size, int(lengths.sum()))))


def _lists(lengths: Sequence[int], values: pa.Array) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values)
