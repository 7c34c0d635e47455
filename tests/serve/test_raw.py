"""Raw values become the ids and numbers that ingest makes of them."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest

from pipeline.data.ingest.ids import Ids
from pipeline.data.ingest.source import stable_hash
from pipeline.data.ingest.spec import Age, FeatureSpec, VocabularySpec
from pipeline.errors import ArtifactError, DataError
from pipeline.schema import DatasetSchema, Feature, Kind, Level, Vocabulary
from pipeline.serve.raw import Preprocessing, RawRows, SortedIds, preprocessing_of
from pipeline.serve.scorer import Scorer

DAY_MS = 86_400_000
CATEGORICAL, NUMERIC = Kind.CATEGORICAL, Kind.NUMERIC
_AT = ("hf",)
SCHEMA = DatasetSchema(
    surfaces=_AT,
    tasks=("click",),
    vocabularies=(
        Vocabulary(name="item", size=4, method="index"),
        Vocabulary(name="user", size=1000, method="hash"),
        Vocabulary(name="hour", size=24),
        Vocabulary(name="tag", size=3, method="index"),
        Vocabulary(name="length", size=4),
    ),
    features=(
        Feature(name="user", level=Level.REQUEST, kind=CATEGORICAL, surfaces=_AT, vocabulary="user"),
        Feature(name="hour", level=Level.REQUEST, kind=CATEGORICAL, surfaces=_AT, vocabulary="hour"),
        Feature(name="item", level=Level.CANDIDATE, kind=CATEGORICAL, surfaces=_AT, vocabulary="item"),
        Feature(name="tag", level=Level.CANDIDATE, kind=CATEGORICAL, surfaces=_AT, vocabulary="tag", multi_valued=True),
        Feature(name="length", level=Level.CANDIDATE, kind=CATEGORICAL, surfaces=_AT, vocabulary="length"),
        Feature(name="plays", level=Level.CANDIDATE, kind=NUMERIC, surfaces=_AT),
        Feature(name="age", level=Level.CANDIDATE, kind=NUMERIC, surfaces=_AT),
        Feature(name="rate", level=Level.CANDIDATE, kind=NUMERIC, surfaces=_AT),
        Feature(name="history_item", level=Level.HISTORY, kind=CATEGORICAL, surfaces=_AT, vocabulary="item"),
    ),
    history_length=5,
)


def spec(name: str, level: str, **more: object) -> FeatureSpec:
    return FeatureSpec.model_validate({"name": name, "level": level, "column": f'"{name}"', **more})


RULES = Preprocessing(
    format_version=1,
    timezone="UTC",
    features={
        "user": spec("user", "request", vocabulary="user"),
        "hour": spec("hour", "request", vocabulary="hour"),
        "item": spec("item", "candidate", vocabulary="item"),
        "tag": spec("tag", "candidate", vocabulary="tag", separator=","),
        "length": spec("length", "candidate", buckets=[10.0, 20.0]),
        "plays": spec("plays", "candidate", numeric=True, log1p=True),
        "age": spec("age", "candidate", numeric=True, age=Age(unit="day", format="%Y-%m-%d")),
    },
    vocabularies={
        "item": VocabularySpec(method="index", size=4),
        "user": VocabularySpec(method="hash", size=1000),
        "hour": VocabularySpec(method="given", size=24),
        "tag": VocabularySpec(method="index", size=3),
    },
    history={"history_item": "item"},
)


@pytest.fixture
def raw(tmp_path: Path) -> RawRows:
    (tmp_path / "preprocessing.json").write_text(RULES.model_dump_json())
    # Not in order of keys, as ingest numbers them by first day.
    pl.DataFrame({"key": ["v9", "v1", "7"], "id": [1, 2, 3]}).write_parquet(tmp_path / "item.parquet")
    pl.DataFrame({"key": ["b", "a"], "id": [1, 2]}).write_parquet(tmp_path / "tag.parquet")
    return RawRows.open(tmp_path / "preprocessing.json", tmp_path, SCHEMA, "hf")


FLAT = {
    "timestamp_ms": [10 * DAY_MS] * 3,
    "user": ["alice", "alice", None],
    "hour": [3, 3, 23],
    "item": ["v1", "never seen", None],
    "tag": ["a, b", "", "c"],
    "length": [9.9, 10.0, None],
    "plays": [0.0, 1.0, None],
    "age": ["1970-01-10", "1970-01-20", None],
    "rate": [0.5, None, -1.0],
    "history_item": [["v9", "x"], ["v9", "x"], []],
}
ENCODED = {
    "hour": [3, 3, 23],
    "item": [2, 0, None],
    "tag": [[2, 1], [], [0]],
    "length": [1, 2, None],
    "rate": [0.5, None, -1.0],
    "history_item": [[1, 0], [1, 0], []],
}


def test_flat_rows_by_hand(raw: RawRows) -> None:
    found = raw.encode(pa.table(FLAT), "rows").to_pydict()
    for name, expected in ENCODED.items():
        assert found[name] == expected, name
    alice = 1 + stable_hash(pl.Series(["alice"])).item() % 999
    assert found["user"] == [alice, alice, None]
    assert found["plays"] == [0.0, pytest.approx(0.6931472), None]
    # Nine days after 1970-01-01 is the 10th; what is younger than the request has age 0.
    assert found["age"] == [1.0, 0.0, None]


def test_grouped_rows_are_flat_ones_in_lists(raw: RawRows) -> None:
    candidate = [f.name for f in SCHEMA.select(level=Level.CANDIDATE)]
    flat = raw.encode(pa.table(FLAT), "rows").to_pydict()
    grouped = {n: [v[0], v[2]] for n, v in FLAT.items()} | {n: [FLAT[n][:2], FLAT[n][2:]] for n in candidate}
    found = raw.encode(pa.table(grouped), "rows").to_pydict()
    for name in candidate:
        assert found[name] == [flat[name][:2], flat[name][2:]], name
    assert found["user"] == [flat["user"][0], flat["user"][2]]


def test_keys_are_the_same_whatever_their_type(raw: RawRows) -> None:
    for seven in (pa.array([7]), pa.array([7.0]), pa.array(["7"]), pa.array([7], pa.int32())):
        rows = pa.table({**{n: v[:1] for n, v in FLAT.items()}, "item": seven})
        assert raw.encode(rows, "rows")["item"].to_pylist() == [3]


def test_sorted_look_ups_are_those_of_ingest() -> None:
    table = pl.DataFrame({"key": [f"k{i * 7 % 100}" for i in range(100)], "id": range(1, 101)})
    keys = pl.Series([f"k{i}" for i in range(-5, 130)] + [None, "", "zzz"])
    how = VocabularySpec(method="index")
    plain = Ids(name="x", spec=how, table=table)
    quick = SortedIds(name="x", spec=how, table=table.sort("key"))
    assert quick.encode(keys).to_list() == plain.encode(keys).to_list()
    assert quick.encode(pl.Series([], dtype=pl.String)).to_list() == []


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("hour", [24, 3, 3], r"takes ids in \[0, 24\), the log has '24'.*column hour"),
        ("length", ["long", "x", "y"], r"holds 'long', which is no number.*column length"),
        ("history_item", ["v9", "v9", "v9"], r"must be a list.*column history_item"),
    ],
)
def test_what_a_rule_cannot_read(raw: RawRows, column: str, values: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        raw.encode(pa.table(FLAT | {column: values}), "rows")


def test_missing_parts(raw: RawRows, scorer: Scorer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"unknown column 'item'.*column item"):
        raw.encode(pa.table(FLAT).drop_columns(["item"]), "rows")
    with pytest.raises(DataError, match="age is an age, so rows need the time"):
        raw.encode(pa.table(FLAT).drop_columns(["timestamp_ms"]), "rows")
    with pytest.raises(DataError, match="carries no rules for raw values"):
        scorer.score(pa.table(FLAT), keys="raw")
    (tmp_path / "tag.parquet").unlink()
    with pytest.raises(ArtifactError, match=r"wants the keys of vocabulary 'tag', and there is no .*tag\.parquet"):
        RawRows.open(tmp_path / "preprocessing.json", tmp_path, SCHEMA, "hf")
    (tmp_path / "preprocessing.json").write_text("{}")
    with pytest.raises(ArtifactError, match="does not hold rules of this version: format_version"):
        RawRows.open(tmp_path / "preprocessing.json", tmp_path, SCHEMA, "hf")


def test_a_log_that_was_not_ingested_has_no_rules() -> None:
    assert preprocessing_of({"command": "simulate"}, SCHEMA) is None
