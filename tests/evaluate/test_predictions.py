from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pipeline.errors import DataError
from pipeline.evaluate.predictions import Predictions, read_predictions, write_predictions
from tests.evaluate.rows import simulated, table


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    written = write_predictions(tmp_path / "new" / "p.parquet", table(label_click=[0.0, 1.0, None, 1.0]))
    read = read_predictions(tmp_path / "new" / "p.parquet")
    assert read.table.equals(written.table)
    assert read.table.schema["candidate"] == pl.Int32
    assert read.table.schema["label_click"] == pl.Float32
    assert read.table.schema["p_click"] == pl.Float64
    assert (read.surfaces, read.dates, read.tasks) == (("hf",), ("2026-01-31",), ("click",))
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["p.parquet"]


def test_rows_leaves_out_what_was_not_observed() -> None:
    rows = Predictions.of(table(label_click=[0.0, None, 1.0, 1.0], surface=["hf", "hf", "hf", "sr"])).rows(
        "hf", "click"
    )
    assert rows.label.tolist() == [0.0, 1.0]
    assert rows.user_id.tolist() == [0, 2]
    assert rows.p.tolist() == pytest.approx([0.1, 0.1 + 2 * 0.8 / 3])


@pytest.mark.parametrize(
    ("change", "column", "says"),
    [
        ({"p_click": [0.1, 0.2, 0.3, 1.5]}, "p_click", r"1 of 4 values lie outside \[0, 1\]"),
        ({"p_click": [0.1, float("nan"), 0.3, float("nan")]}, "p_click", "2 of 4"),
        ({"p_click": [0.1, None, 0.3, 0.4]}, "p_click", "1 of 4 values are null"),
        ({"label_click": [0.0, float("nan"), 1.0, 1.0]}, "label_click", "1 of 4 values lie outside"),
        ({"label_click": [0.0, 2.0, 1.0, 1.0]}, "label_click", "1 of 4"),
        ({"weight": [1.0, -1.0, 1.0, float("inf")]}, "weight", "2 of 4"),
        ({"truth_click": [0.1, 0.2, 0.3, -0.4]}, "truth_click", "1 of 4"),
        ({"user_id": [1, None, 2, 3]}, "user_id", "1 of 4 values are null"),
        ({"request_id": ["a", "b", "c", "d"]}, "request_id", "String"),
        ({"request_id": [1, 1, 2, 3]}, "candidate", "1 of 4 rows repeat"),
        ({"candidate": [0, 1, 2, 2**40]}, "candidate", "1 values do not fit"),
        ({"label_like": [0.0] * 4}, "label_like", "add p_like"),
    ],
)
def test_bad_values_name_file_and_column(tmp_path: Path, change: dict[str, list], column: str, says: str) -> None:
    file = tmp_path / "bad.parquet"
    table(**change).write_parquet(file)
    with pytest.raises(DataError, match=says) as caught:
        read_predictions(file)
    assert (caught.value.file, caught.value.column) == (str(file), column)


def test_missing_columns_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing") as caught:
        Predictions.of(table().drop("user_id"))
    assert caught.value.column == "user_id"
    with pytest.raises(DataError, match="nothing to judge"):
        Predictions.of(table().drop("p_click", "label_click"))
    with pytest.raises(DataError, match="no such predictions file"):
        read_predictions(tmp_path / "none.parquet")
    whole = tmp_path / "whole.parquet"
    write_predictions(whole, table())
    (tmp_path / "cut.parquet").write_bytes(whole.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"no whole Parquet file.*cut\.parquet"):
        read_predictions(tmp_path / "cut.parquet")


def test_a_bad_table_leaves_the_old_file(tmp_path: Path) -> None:
    write_predictions(tmp_path / "p.parquet", table())
    with pytest.raises(DataError):
        write_predictions(tmp_path / "p.parquet", table(weight=[-1.0] * 4))
    assert len(read_predictions(tmp_path / "p.parquet")) == 4


def test_using_swaps_the_probability_under_judgement() -> None:
    predictions = simulated(rows=100)
    oracle = predictions.using("truth")
    assert np.array_equal(oracle.table["p_click"], predictions.table["truth_click"])
    with pytest.raises(DataError, match="no raw probability"):
        predictions.using("raw")
    with pytest.raises(DataError, match="did you mean 'truth'"):
        predictions.using("truht")


def test_concat_and_select_are_each_others_inverse() -> None:
    whole = simulated(rows=200)
    parts = [whole.select(surfaces=[s]) for s in whole.surfaces]
    assert sum(map(len, parts)) == 200
    joined = Predictions.concat(parts)
    assert joined.table.sort("request_id").equals(whole.table.sort("request_id"))
    with pytest.raises(DataError, match="repeat a candidate"):
        Predictions.concat([whole, parts[0]])
    with pytest.raises(DataError, match="unknown surface 'hff'; did you mean 'hf'"):
        whole.select(surfaces=["hff"])
