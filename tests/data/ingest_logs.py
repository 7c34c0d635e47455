"""Tiny flat logs and specs for the tests of ingest, and an independent reckoning of what must come out."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml

from pipeline.data.ingest import ingest
from pipeline.data.logs import Dataset

DAY = 86_400_000
MINUTE = 60_000

SPEC: dict[str, Any] = {
    "name": "tiny",
    "parameters": {"root": {"help": "folder of the files"}},
    "log": {"files": ["${root}/log.csv"]},
    "tables": {"items": {"files": ["${root}/items.csv"], "key": "id", "log_key": "item", "types": {"tags": "text"}}},
    "user": "user",
    "item": "item",
    "time": {"column": "time"},
    "surface": {"column": "tab", "map": {"h": "hf", "s": "sr"}, "others": "history"},
    "request": {"gap_s": 0},
    "tasks": {"click": "click", "long": "long"},
    "label_delay_s": 0,
    "days": {"timezone": "UTC"},
    "vocabularies": {"item": {"method": "index"}, "author": {"method": "index"}, "tag": {"method": "index"}},
    "features": [
        {"name": "item", "level": "candidate", "column": "item", "vocabulary": "item"},
        {"name": "author", "level": "candidate", "table": "items", "column": "author", "vocabulary": "author"},
        {
            "name": "tag",
            "level": "candidate",
            "table": "items",
            "column": "tags",
            "vocabulary": "tag",
            "separator": ",",
        },
    ],
    "history": {"length": 3, "features": {"history_item": "item", "history_author": "author"}},
}
ITEMS = pl.DataFrame(
    {"id": ["a", "b", "c", "d"], "author": ["x", "x", "y", None], "tags": ["1,2", "2", None, "3"]},
)
CAUSAL: dict[str, Any] = {
    "base_resolution_s": 60,
    "rates": [
        {"name": "u", "keys": ["user"], "strength": 4, "ewma_weight": 0.5},
        {"name": "us", "keys": ["user", "surface"]},
        {"name": "ua", "keys": ["user", "author"]},
        {"name": "ut", "keys": ["user", "tag"]},
        {"name": "i", "keys": ["item"], "strength": 10},
        {"name": "is", "keys": ["item", "surface"], "tasks": ["long"]},
        {"name": "t", "keys": ["tag"]},
    ],
    "session": {"gap_s": 600},
}


def spec_with(**changes: Any) -> dict[str, Any]:
    """The tiny spec with some fields replaced."""
    return {**copy.deepcopy(SPEC), **changes}


def write(root: Path, spec: dict[str, Any], log: pl.DataFrame, items: pl.DataFrame = ITEMS) -> Path:
    """Write the spec and its files; the spec's path."""
    root.mkdir(parents=True, exist_ok=True)
    log.write_csv(root / "log.csv")
    items.write_csv(root / "items.csv")
    (root / "spec.yaml").write_text(yaml.safe_dump(spec))
    return root / "spec.yaml"


def run(root: Path, spec: dict[str, Any], log: pl.DataFrame, out: str = "out", **options: Any) -> Dataset:
    """Write and ingest."""
    return ingest(write(root, spec, log), root / out, {"root": str(root)}, **options)


def rows(dataset: Dataset) -> list[dict[str, Any]]:
    """Every request of a log with its surface, in order of time, then user, then surface."""
    found = [
        {**row, "surface": p.surface, "date": p.date}
        for p in dataset.description.partitions
        for f in p.files
        for row in pl.read_parquet(dataset.root / f.path, hive_partitioning=False).iter_rows(named=True)
    ]
    return sorted(found, key=lambda r: (r["timestamp_ms"], r["user_id"], r["surface"], r["request_id"]))


def raw_ids(dataset: Dataset, vocabulary: str) -> dict[str, int]:
    """Key to id, as written for serving."""
    table = pl.read_parquet(dataset.root / "vocabularies" / f"{vocabulary}.parquet")
    return dict(table.select("key", "id").iter_rows())


def random_log(
    seed: int, events: int, *, users: int = 3, days: int = 3, minutes: int = 30, items: Sequence[str] = "abcd"
) -> pl.DataFrame:
    """A log with many equal times, three raw surfaces (one not mapped) and outcomes that are often null."""
    g = np.random.default_rng(seed)
    day = g.integers(0, days, events)
    return pl.DataFrame(
        {
            "user": g.integers(1, users + 1, events),
            "item": g.choice(list(items), events),
            "time": 10_000 * DAY + day * DAY + g.integers(0, 2 * minutes, events) * (MINUTE // 2),
            "tab": g.choice(["h", "s", "z"], events),
            "click": [None if x == 2 else int(x) for x in g.integers(0, 3, events)],
            "long": g.integers(0, 2, events),
        },
        schema_overrides={"click": pl.Int64},
    )


class Reckoning:
    """The causal features of a tiny log by plain loops over all events: what the fast code must equal."""

    def __init__(self, log: pl.DataFrame, delay_ms: int) -> None:
        tags = {"a": {"1", "2"}, "b": {"2"}, "c": set(), "d": {"3"}}
        author = {"a": "x", "b": "x", "c": "y", "d": None}
        self.delay = delay_ms
        self.events = [{**e, "author": author[e["item"]], "tags": tags[e["item"]]} for e in log.iter_rows(named=True)]

    def base(self, tab: str, until: int, task: str) -> float:
        """Known base rate: whole minutes that ended at or before `until`, and two events of rate 0.5."""
        known = [
            e[task]
            for e in self.events
            if e["tab"] == tab and (e["time"] // MINUTE + 1) * MINUTE <= until and e[task] is not None
        ]
        return (sum(known) + 1.0) / (len(known) + 2.0)

    def known(self, now: int, **keys: Any) -> list[dict[str, Any]]:
        """Events before now - delay that agree with the keys."""
        return [e for e in self.events if e["time"] < now - self.delay and all(e[k] == v for k, v in keys.items())]

    def rate(self, events: list[dict[str, Any]], task: str, strength: float) -> float:
        """Mean residual, shrunk."""
        seen = [e for e in events if e[task] is not None]
        residuals = [e[task] - self.base(e["tab"], e["time"] - self.delay, task) for e in seen]
        return sum(residuals) / (len(residuals) + strength)
