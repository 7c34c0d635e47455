"""Raw keys to ids: stored lists, hashes and given ids, and the mapping written for serving."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.data.ingest.source import stable_hash
from pipeline.data.ingest.spec import VocabularySpec
from pipeline.errors import DataError

UNKNOWN = 0  # the id of keys that have none
ALWAYS = -1  # "day" of keys that do not come from a day of the log, but from side tables and the time before

KEYS_SCHEMA = {"key": pl.String, "day": pl.Int32}


def first_days(keys: pl.DataFrame) -> pl.DataFrame:
    """One row a key with the first day it was seen, of many rows (key, day)."""
    return keys.filter(pl.col("key").is_not_null()).group_by("key").agg(pl.col("day").min())


@dataclass(frozen=True, kw_only=True)
class Ids:
    """One id space, ready to turn keys into ids.

    Args:
        name: of the vocabulary.
        spec: how.
        table: for method index: key and id; else empty.
    """

    name: str
    spec: VocabularySpec
    table: pl.DataFrame

    @staticmethod
    def build(name: str, spec: VocabularySpec, keys: pl.DataFrame, before: pl.DataFrame | None = None) -> Ids:
        """Number the keys by (first day, key): later days only append, so ids never change.

        Args:
            keys: `key` and `day` from this ingest; several rows a key are fine.
            before: key and id of an earlier ingest that this one continues.
        """
        if spec.method != "index":
            return Ids(name=name, spec=spec, table=pl.DataFrame(schema={"key": pl.String, "id": pl.Int64}))
        new = first_days(keys)
        if before is None:
            before = pl.DataFrame(schema={"key": pl.String, "id": pl.Int64})
        new = new.join(before, on="key", how="anti").sort("day", "key")
        fresh = new.select("key", (pl.int_range(pl.len(), dtype=pl.Int64) + (len(before) + 1)).alias("id"))
        table = pl.concat([before, fresh])
        if spec.size is not None:
            table = table.head(spec.size - 1)
        return Ids(name=name, spec=spec, table=table)

    @property
    def size(self) -> int:
        """Number of ids, the unknown one among them."""
        return self.spec.size if self.spec.size is not None else max(len(self.table) + 1, 2)

    def encode(self, keys: pl.Series) -> pl.Series:
        """Ids of keys; null stays null, a key without id becomes `UNKNOWN`.

        Raises:
            DataError: method given, and a key is not a whole number in [0, size).
        """
        if self.spec.method == "hash":
            return stable_hash(keys) % (self.size - 1) + 1
        if self.spec.method == "given":
            ids = keys.cast(pl.Int64, strict=False)
            wrong = keys.filter(keys.is_not_null() & ~ids.is_between(0, self.size - 1).fill_null(False))
            if len(wrong):
                raise DataError(f"vocabulary {self.name!r} takes ids in [0, {self.size}), the log has {wrong[0]!r}")
            return ids
        frame = pl.DataFrame({"key": keys})
        found = frame.join(self.table, on="key", how="left", maintain_order="left")
        return found.select(pl.when(pl.col("key").is_not_null()).then(pl.col("id").fill_null(UNKNOWN))).to_series()

    def encode_lists(self, lists: pl.Series) -> pl.Series:
        """Ids of lists of keys; a null list becomes an empty one, keys without id `UNKNOWN`."""
        offsets, keys = list_parts(lists)
        ids = self.encode(keys)
        return list_series(offsets, ids.to_numpy().astype(np.int64))

    def hash_collisions(self, keys: pl.DataFrame) -> dict[str, Any]:
        """How many of the keys share their id with another key: for provenance."""
        unique = keys["key"].drop_nulls().unique()
        shared = int(self.encode(unique).is_duplicated().sum())
        return {"size": self.size, "keys": len(unique), "colliding_share": shared / max(len(unique), 1)}

    def write(self, root: Path) -> None:
        """Write `vocabularies/NAME.parquet` (key, id)."""
        folder = root / "vocabularies"
        folder.mkdir(parents=True, exist_ok=True)
        self.table.write_parquet(folder / f"{self.name}.parquet")


def list_parts(lists: pl.Series) -> tuple[np.ndarray, pl.Series]:
    """Offsets (one more than rows) and values of a list column; null lists count as empty."""
    lengths = lists.list.len().fill_null(0).to_numpy().astype(np.int64)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    values = lists.filter(pl.Series(lengths > 0)).explode()
    return offsets, values


def list_series(offsets: np.ndarray, values: np.ndarray) -> pl.Series:
    """A list column from offsets and values."""
    return pl.Series(pl.from_arrow(pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values))))
