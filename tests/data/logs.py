"""Small random logs with every kind of column, for tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.data.logs import DESCRIPTION, Dataset, arrow_schema
from pipeline.data.writer import LogWriter
from pipeline.schema import DatasetSchema, Feature, Kind, Level, Vocabulary

SURFACES = ("hf", "sr", "rp")
DAYS = ("2026-01-01", "2026-01-02")
NOW_MS = 1_767_225_600_000


def schema(*, weighted: bool = False) -> DatasetSchema:
    """Every kind of feature: levels, kinds, multi-valued, of one surface only, shared vocabulary."""

    def feature(name: str, level: Level, vocabulary: str | None, **more: Any) -> Feature:
        kind = Kind.NUMERIC if vocabulary is None else Kind.CATEGORICAL
        return Feature(name=name, level=level, kind=kind, vocabulary=vocabulary, **{"surfaces": SURFACES, **more})

    return DatasetSchema(
        surfaces=SURFACES,
        tasks=("click", "save"),
        vocabularies=tuple(
            Vocabulary(name=n, size=s)
            for n, s in (("user", 50), ("item", 40), ("topic", 8), ("query", 12), ("country", 5))
        ),
        features=(
            feature("user", Level.REQUEST, "user"),
            feature("country", Level.REQUEST, "country"),
            feature("query", Level.REQUEST, "query", surfaces=("sr",), multi_valued=True),
            feature("related_item", Level.REQUEST, "item", surfaces=("rp",)),
            feature("hour", Level.REQUEST, None),
            feature("item", Level.CANDIDATE, "item"),
            feature("topics", Level.CANDIDATE, "topic", multi_valued=True),
            feature("price", Level.CANDIDATE, None),
            feature("match", Level.CANDIDATE, None, surfaces=("sr",)),
            feature("history_item", Level.HISTORY, "item"),
        ),
        history_length=6,
        label_delay_ms=1000,
        weighted=weighted,
    )


def request(rng: np.random.Generator, surface: str, number: int, of: DatasetSchema) -> dict[str, Any]:
    """One random row."""
    candidates, events = int(rng.integers(0, 4)), int(rng.integers(0, 7))
    time = NOW_MS + number * 60_000

    def maybe(value: Any) -> Any:
        return None if rng.random() < 0.2 else value

    row: dict[str, Any] = {
        "request_id": number,
        "user_id": int(rng.integers(0, 30)),
        "timestamp_ms": time,
        "user": int(rng.integers(0, 50)),
        "country": maybe(int(rng.integers(0, 5))),
        "hour": maybe(float(rng.random())),
        "item": rng.integers(0, 40, candidates).tolist(),
        "topics": [rng.integers(0, 8, rng.integers(0, 3)).tolist() for _ in range(candidates)],
        "price": [maybe(float(rng.random())) for _ in range(candidates)],
        "history_item": rng.integers(0, 40, events).tolist(),
        "history_action": rng.integers(0, of.action_count, events).tolist(),
        "history_surface": rng.integers(0, 4, events).tolist(),
        "history_time_ms": np.sort(time - rng.integers(1_001, 90_000_000, events)).tolist(),
        "click": [float(rng.random() < 0.3) for _ in range(candidates)],
        "save": [maybe(float(rng.random() < 0.1)) for _ in range(candidates)],
    }
    if surface == "sr":
        row["query"] = rng.integers(0, 12, rng.integers(0, 3)).tolist()
        row["match"] = [float(rng.random()) for _ in range(candidates)]
    if surface == "rp":
        row["related_item"] = maybe(int(rng.integers(0, 40)))
    if of.weighted:
        row["weight"] = rng.random(candidates).tolist()
    return row


def table(rows: list[dict[str, Any]], surface: str, of: DatasetSchema) -> pa.Table:
    """Rows as a table of the surface's columns."""
    return pa.Table.from_pylist(rows, schema=arrow_schema(of, surface))


def write_log(
    root: Path,
    sizes: Mapping[str, int],
    *,
    seed: int = 0,
    row_group_requests: int = 7,
    weighted: bool = False,
) -> tuple[Dataset, dict[tuple[str, int], dict[str, Any]]]:
    """A log with `sizes` requests a surface over two days; also its rows by (surface, request_id)."""
    rng = np.random.default_rng(seed)
    of = schema(weighted=weighted)
    writer = LogWriter(root, of, row_group_requests=row_group_requests)
    kept: dict[tuple[str, int], dict[str, Any]] = {}
    for surface, size in sizes.items():
        rows = [request(rng, surface, number, of) for number in range(size)]
        kept |= {(surface, row["request_id"]): row for row in rows}
        for day, part in zip(DAYS, (rows[: size * 2 // 3], rows[size * 2 // 3 :]), strict=True):
            if part:
                writer.write(surface, day, table(part, surface, of))
    return writer.close({"made by": "tests"}), kept


def rewrite(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Edit a log's description on purpose, so without a checksum."""
    path = root / DESCRIPTION
    description = json.loads(path.read_text())
    description.pop("sha256", None)
    change(description)
    path.write_text(json.dumps(description))
