"""Each fault of a row group is one error that names file, row group and column."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.data.check import check_columns, check_table, table_faults
from pipeline.data.logs import arrow_schema
from pipeline.errors import DataError
from tests.data.logs import NOW_MS, request, schema, table

Rows = list[dict[str, Any]]


def rows(*, candidates: int = 2, events: int = 3) -> Rows:
    """Sound requests of `sr` with the given sizes."""
    rng, found = np.random.default_rng(0), []
    for number in range(4):
        row = request(rng, "sr", number, schema(weighted=True))
        row |= {"item": [1] * candidates, "topics": [[1]] * candidates, "price": [0.5] * candidates}
        row |= {c: [0.5] * candidates for c in ("match", "click", "save", "weight")}
        row |= {c: [1] * events for c in ("history_item", "history_action", "history_surface")}
        row["history_time_ms"] = [row["timestamp_ms"] - 10_000 + i for i in range(events)]
        found.append(row)
    return found


def check(of: Rows) -> None:
    check_table(table(of, "sr", schema(weighted=True)), schema(weighted=True), "sr", file="a.parquet", row_group=3)


def put(column: str, value: Any) -> Callable[[Rows], None]:
    def change(of: Rows) -> None:
        of[2][column] = value

    return change


FAULTS = [
    ("item", [1], "row 2 has 1 entries where 'click' has 2"),
    ("save", [0.5, 0.5, 0.5], "row 2 has 3 entries where 'click' has 2"),
    ("weight", [1.0], "row 2 has 1 entries where 'click' has 2"),
    ("history_action", [1], "row 2 has 1 entries where 'history_item' has 3"),
    ("click", [0.0, 1.5], r"label 1.5; it must lie in \[0, 1\]"),
    ("click", [0.0, -0.5], r"label -0.5"),
    ("click", [0.0, float("nan")], "label nan"),
    ("weight", [1.0, -1.0], "weight -1.0"),
    ("weight", [1.0, float("inf")], "weight inf"),
    ("price", [float("nan"), 1.0], "NaN or infinity"),
    ("hour", float("inf"), "NaN or infinity"),
    ("item", [40, 1], r"holds 40; ids of vocabulary 'item' lie in \[0, 40\)"),
    ("item", [-1, 39], "holds -1"),
    ("item", [None, 39], "a candidate lacks its id; vocabulary 'item' is used at several levels"),
    ("query", [12], "holds 12"),
    ("topics", [[1], [8]], "holds 8"),
    ("user", 50, "holds 50"),
    ("history_item", [1, None, 2], "lacks its id"),
    ("history_action", [1, 5, 1], r"holds 5; codes lie in \[0, 5\)"),
    ("history_surface", [1, 1, -1], "holds -1"),
    ("history_surface", [1, None, 1], "a history event lacks its surface"),
    ("history_time_ms", [None, NOW_MS, NOW_MS + 1], "a history event lacks its time"),
    ("save", [None, 1.5], "label 1.5"),
    ("price", [None, float("inf")], "NaN or infinity"),
    ("topics", [[None], [-1]], "holds -1"),
    ("history_item", None, "null lists"),
    ("click", None, "null lists"),
    ("history_time_ms", [NOW_MS, NOW_MS + 2, NOW_MS + 1], "history of row 2 is not in order"),
    ("history_time_ms", [NOW_MS, NOW_MS + 1, NOW_MS + 119_000], "the history leaks the future"),
]


def test_sound_rows_pass() -> None:
    check(rows())
    check(rows(candidates=0, events=0))
    of = rows()
    of[2]["history_time_ms"] = [NOW_MS, NOW_MS + 1, NOW_MS + 118_999]  # the last moment: 1 s of delay before 120 s
    check(of)


@pytest.mark.parametrize(("column", "value", "message"), FAULTS)
def test_each_fault_names_its_place(column: str, value: Any, message: str) -> None:
    of = rows()
    put(column, value)(of)
    with pytest.raises(DataError, match=message) as caught:
        check(of)
    assert (caught.value.file, caught.value.row_group, caught.value.column) == ("a.parquet", 3, column)


def test_nulls_of_identity_are_faults() -> None:
    sound = table(rows(), "sr", schema(weighted=True))
    holes = pa.array([1, None, 3, 4], pa.int64())
    broken = sound.set_column(sound.column_names.index("user_id"), "user_id", holes)
    with pytest.raises(DataError, match="the column holds nulls"):
        check_table(broken, schema(weighted=True), "sr", file="a.parquet")


def test_every_fault_is_found_not_the_first_alone() -> None:
    of = rows()
    for change in (put("item", [40, 1]), put("click", [2.0, 0.0]), put("hour", float("nan"))):
        change(of)
    faults = table_faults(table(of, "sr", schema(weighted=True)), schema(weighted=True), "sr", file="a.parquet")
    assert {f.column for f in faults} == {"item", "click", "hour"}


def test_slices_of_tables_are_checked_as_they_stand() -> None:
    of = rows()
    put("item", [1])(of)
    whole = table(of, "sr", schema(weighted=True)).combine_chunks()
    check_table(whole.slice(0, 2), schema(weighted=True), "sr", file="a.parquet")
    check_table(whole.slice(3, 1), schema(weighted=True), "sr", file="a.parquet")
    with pytest.raises(DataError, match="row 1 has 1 entries"):
        check_table(whole.slice(1, 2), schema(weighted=True), "sr", file="a.parquet")


def test_columns_are_checked_by_name_and_type() -> None:
    expected = arrow_schema(schema(), "sr")
    check_columns(expected, schema(), "sr", file="a.parquet")
    without = pa.schema([f for f in expected if f.name != "match"])
    with pytest.raises(DataError, match=r"lacks a column that dataset\.json declares for surface 'sr'") as caught:
        check_columns(without, schema(), "sr", file="a.parquet")
    assert caught.value.column == "match"
    other = expected.set(expected.get_field_index("price"), pa.field("price", pa.list_(pa.float64())))
    with pytest.raises(DataError, match=r"has type list<.*double>, it must be list<.*float>"):
        check_columns(other, schema(), "sr", file="a.parquet")
    check_columns(other, schema(), "sr", ["item"], file="a.parquet")
