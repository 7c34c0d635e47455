"""What embedding tables learned: the norms of their rows by how often training saw the id, and keys that share a row.

A row that no batch held keeps its first values, so its norm is that of the initialisation; a row that was seen often
and has not moved from there says that the feature tells nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.data.batch import Batch
from pipeline.data.layout import FeatureLayout
from pipeline.data.logs import Dataset
from pipeline.train.tables import table_of
from pipeline.train.task import TrainTask

QUANTILES = (0.1, 0.5, 0.9)


@dataclass(frozen=True, kw_only=True)
class RowNorms:
    """Euclidean norms of a table's rows that were seen equally often.

    Args:
        seen: how often at least, such as "4+" for 4 to 7: a power of two to the next.
        rows: how many.
        low, median, high: 10 %, 50 % and 90 % quantiles of the norms.
    """

    seen: str
    rows: int
    low: float
    median: float
    high: float


@dataclass(frozen=True, kw_only=True)
class SharedRows:
    """Keys of a hashed vocabulary that share their row with another.

    Args:
        rows: of the table.
        keys: distinct.
        share: of the keys.
        expected: of a hash that spreads keys evenly.
    """

    rows: int
    keys: int
    share: float
    expected: float


def lookups(layout: FeatureLayout, rows: Mapping[str, int], batches: Iterable[Batch]) -> dict[str, np.ndarray]:
    """How often batches look up each row of each table, int64 [rows of the table].

    Args:
        layout: of the model.
        rows: of each table.
        batches: to count.
    """
    counts = {table: np.zeros(n, dtype=np.int64) for table, n in rows.items()}
    for batch in batches:
        inputs = batch.inputs
        for keyed in (inputs.request_ids, inputs.candidate_ids, inputs.sequence_ids):
            for feature in keyed.keys():  # noqa: SIM118  # a KeyedJaggedTensor is no mapping
                table = layout.vocabularies[feature]
                ids = keyed[feature].values().cpu().numpy()
                counts[table] += np.bincount(ids, minlength=counts[table].size)
    return counts


def row_norms(task: TrainTask, counts: Mapping[str, np.ndarray]) -> dict[str, list[RowNorms]]:
    """By table, the norms of rows by how often they were looked up, seldom ones first.

    Args:
        task: a model on one device, unsharded.
        counts: from `lookups`.
    """
    found: dict[str, list[RowNorms]] = {}
    for name, parameter in task.named_parameters():
        table = table_of(name)
        if table is None:
            continue
        norms = np.linalg.norm(parameter.detach().cpu().double().numpy(), axis=1)
        # 0 stays 0; 1 is 1, 2 and 3 are 2, 4 to 7 are 3, ...
        level = np.where(counts[table] > 0, np.floor(np.log2(np.maximum(counts[table], 1))) + 1, 0).astype(int)
        # A feature may be pooled at one level and part of a sequence at another: two tables of one vocabulary.
        key = table if table not in found else name.removeprefix("model.embeddings.").split(".")[0] + "." + table
        found[key] = [_norms(norms[level == i], int(i)) for i in np.unique(level)]
    return found


def shared_rows(dataset: Dataset) -> dict[str, SharedRows]:
    """By hashed vocabulary, how many keys collided when the log was ingested; empty where none is hashed."""
    found: dict[str, dict[str, float]] = dataset.description.provenance.get("hash_collisions", {})
    return {
        name: SharedRows(
            rows=int(of["size"]),
            keys=int(of["keys"]),
            share=float(of["colliding_share"]),
            expected=expected_sharing(int(of["keys"]), int(of["size"])),
        )
        for name, of in found.items()
    }


def expected_sharing(keys: int, rows: int) -> float:
    """Share of keys that meet another when n keys are hashed evenly to all rows but row 0: 1 - (1 - 1/m)^(n - 1).

    >>> round(expected_sharing(keys=2, rows=3), 3)
    0.5
    """
    return float(1 - (1 - 1 / (rows - 1)) ** (keys - 1)) if keys > 1 else 0.0


def _norms(norms: np.ndarray, level: int) -> RowNorms:
    low, median, high = np.quantile(norms, QUANTILES)
    first = 2 ** max(level - 1, 0)
    seen = str(level) if level < 2 else f"{first}+" if first < 1024 else f"{first // 1024}k+"
    return RowNorms(seen=seen, rows=norms.size, low=float(low), median=float(median), high=float(high))
