"""A log's description is read whole or refused with its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.logs import Dataset
from pipeline.data.writer import LogWriter
from pipeline.errors import DataError
from tests.data.logs import rewrite, schema, table, write_log

Change = Callable[[dict[str, Any]], None]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_log(tmp_path / "data", {"hf": 20, "sr": 8, "rp": 3})[0].root


def first_file(description: dict[str, Any]) -> dict[str, Any]:
    return description["partitions"][0]["files"][0]


def test_a_log_tells_its_rows(root: Path) -> None:
    dataset = Dataset.open(root)
    assert {s: sum(p.requests for p in dataset.partitions(s)) for s in dataset.schema.surfaces} == {
        "hf": 20,
        "sr": 8,
        "rp": 3,
    }
    assert dataset.partitions("hf")[0].files[0].row_group_rows == (7, 6)
    assert dataset.fingerprint == Dataset.open(root).fingerprint


def test_a_file_that_is_no_description_is_refused(root: Path) -> None:
    for text, message in ((b"{", "is not a JSON object"), (b"[1]", "is not a JSON object"), (b"\xff", "not a JSON")):
        (root / "dataset.json").write_bytes(text)
        with pytest.raises(DataError, match=message):
            Dataset.open(root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format_version=2), "format_version is 2, this version of Trefoil reads 1"),
        (lambda d: d.update(surprise=1), "surprise: "),
        (lambda d: first_file(d).update(surprise=1), r"partitions\.0\.files\.0\.surprise: "),
        (lambda d: d["schema"].update(surprise=1), r"schema\.surprise: "),
        (lambda d: d["schema"]["features"][0].update(surprise=1), r"schema\.features\.0\.surprise: "),
        (lambda d: d.pop("partitions"), "partitions: Field required"),
        (lambda d: d["schema"]["tasks"].append("click"), "column 'click' is declared more than once"),
        (lambda d: first_file(d).update(path="../elsewhere.parquet"), "names a file outside its folder"),
        (lambda d: first_file(d).update(path="/etc/passwd"), "names a file outside its folder"),
        (lambda d: first_file(d).update(path="surface=hf/gone.parquet"), "names a file that is not there"),
        (lambda d: first_file(d).update(bytes=1), "the description says 1; write the log anew"),
    ],
)
def test_a_damaged_description_is_refused_with_its_place(root: Path, change: Change, message: str) -> None:
    rewrite(root, change)
    with pytest.raises(DataError, match=message):
        Dataset.open(root)


def test_a_folder_without_description_is_no_log(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such data folder"):
        Dataset.open(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"holds no dataset\.json"):
        Dataset.open(tmp_path)


def test_a_writer_takes_what_fits_and_nothing_else(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="already holds a log"):
        LogWriter(root, schema())
    writer = LogWriter(tmp_path / "new", schema())
    empty = table([], "hf", schema())
    with pytest.raises(DataError, match="lacks a column") as caught:
        writer.write("hf", "2026-01-01", empty.drop_columns(["price"]))
    assert caught.value.column == "price"
    with pytest.raises(DataError, match="does not declare"):
        writer.write("hf", "2026-01-01", empty.append_column("more", [[]]))
