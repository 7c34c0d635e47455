"""Bad specs and bad data: one clear error that names the place and the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from pipeline.data.ingest import ingest, load_spec
from pipeline.data.ingest.history import HistoryBuilder
from pipeline.errors import ConfigError, DataError
from tests.data.ingest_logs import DAY, ITEMS, random_log, run, spec_with, write

LOG = pl.DataFrame(
    {"user": [1, 2], "item": ["a", "b"], "time": [DAY, 2 * DAY], "tab": ["h", "s"], "click": [1, 0], "long": [0, 1]}
)


def complaint(tmp_path: Path, spec: dict[str, Any]) -> str:
    path = write(tmp_path, spec, LOG)
    with pytest.raises(ConfigError) as error:
        load_spec(path, {"root": str(tmp_path)})
    return str(error.value)


def test_unknown_fields_name_the_nearest(tmp_path: Path) -> None:
    text = complaint(tmp_path, spec_with(tsaks={}, surface={"colum": "tab", "map": {"h": "hf"}, "others": "drop"}))
    assert "tsaks: unknown field 'tsaks'; did you mean 'tasks'?" in text
    assert "surface.colum: unknown field 'colum'; did you mean 'column'?" in text


def test_the_label_delay_must_be_stated(tmp_path: Path) -> None:
    spec = spec_with()
    del spec["label_delay_s"]
    assert "label_delay_s: state how many seconds pass until an outcome is known" in complaint(tmp_path, spec)


def test_contradictions_are_reported_together(tmp_path: Path) -> None:
    features = [
        {"name": "item", "level": "candidate", "column": "item", "vocabulary": "itm"},
        {"name": "_x", "level": "candidate", "column": "item", "table": "item", "numeric": True, "buckets": [2, 1]},
        {"name": "click", "level": "request", "column": "item", "numeric": True, "surfaces": ["hff"]},
    ]
    causal = {"rates": [{"name": "r", "keys": ["surface"]}, {"name": "r", "keys": ["autor"], "tasks": ["clik"]}]}
    text = complaint(
        tmp_path,
        spec_with(
            features=features,
            causal=causal,
            request={"id": "x", "gap_s": 1},
            days={"timezone": "Asia/Shanghay", "first": "yesterday"},
            history={"length": 2, "features": {"history_author": "item"}},
        ),
    )
    for part in (
        "unknown vocabulary 'itm'; did you mean 'item'?",
        "features.1 (_x).name: a name is letters",
        "features.1 (_x).table: unknown table 'item'; did you mean 'items'?",
        "give exactly one of vocabulary, numeric and buckets",
        "edges must rise",
        "features.2 (click): the name is taken",
        "unknown surface 'hff'; did you mean 'hf'?",
        "the surface alone is the base rate",
        "unknown task 'clik'; did you mean 'click'?",
        "causal: 'r' is declared more than once",
        "request: give exactly one of id and gap_s",
        "did you mean 'Asia/Shanghai'?",
        "days.first: 'yesterday' is not a day",
        "history_item must name the candidate feature",
    ):
        assert part in text


def test_parameters(tmp_path: Path) -> None:
    path = write(tmp_path, spec_with(), LOG)
    with pytest.raises(ConfigError, match="parameter 'root' \\(folder of the files\\) is required: give root=VALUE"):
        load_spec(path)
    with pytest.raises(ConfigError, match=r"unknown parameter 'rot'; did you mean 'root'\?"):
        load_spec(path, {"root": "x", "rot": "y"})
    with pytest.raises(ConfigError, match=r"unknown shipped spec 'kuairnd'; did you mean 'kuairand'\?"):
        load_spec("kuairnd")
    with pytest.raises(ConfigError, match=r"no spec file .*nowhere\.yaml; shipped specs are: kuairand, mind"):
        load_spec(tmp_path / "nowhere.yaml")
    assert load_spec("kuairand", {"root": "x", "label_delay_s": "600"}).delay_ms == 600_000


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("user", [1, None], r"row 2 has no user \(file .*log.csv, column user\)"),
        ("time", [DAY, None], r"row 2 has no readable time \(file .*log.csv, column time\)"),
        ("tab", [None, "s"], r"row 1 has no surface \(file .*log.csv, column tab\)"),
        ("click", [1, 7], r"row 2 has 7.0 for task 'click'; a label is a number in \[0, 1\] or null"),
        ("long", ["yes", "1"], r"row 1 has None for task 'long'; a label is a number in \[0, 1\] or null"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, column: str, values: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        run(tmp_path, spec_with(), LOG.with_columns(pl.Series(column, values)))


def test_missing_columns_name_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"item: unknown column 'item'; did you mean 'itme'\? .*file .*log.csv"):
        run(tmp_path, spec_with(), LOG.rename({"item": "itme"}))
    with pytest.raises(DataError, match=r"tasks\.click: cannot parse the expression"):
        run(tmp_path, spec_with(tasks={"click": "click +* 2"}), LOG)
    with pytest.raises(DataError, match=r"no file matches, named under log\.files"):
        run(tmp_path, spec_with(log={"files": ["${root}/nothing-*.csv"]}), LOG)


def test_keys_that_stand_twice_in_a_side_table(tmp_path: Path) -> None:
    path = write(tmp_path, spec_with(), LOG, pl.concat([ITEMS, ITEMS.head(1)]))
    with pytest.raises(DataError, match="key 'a' stands more than once in table 'items'"):
        ingest(path, tmp_path / "out", {"root": str(tmp_path)})


def test_given_ids_out_of_range(tmp_path: Path) -> None:
    vocabularies = {**spec_with()["vocabularies"], "item": {"method": "given", "size": 5}}
    with pytest.raises(DataError, match=r"feature item: vocabulary 'item' takes ids in \[0, 5\), the log has 'a'"):
        run(tmp_path, spec_with(vocabularies=vocabularies), LOG)


def test_a_planted_leak_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = HistoryBuilder.lists
    # A history that looks one millisecond too far must not reach the disk.
    monkeypatch.setattr(HistoryBuilder, "lists", lambda self, user, time: genuine(self, user, time + 1))
    with pytest.raises(DataError, match="the history leaks the future"):
        run(tmp_path, spec_with(), random_log(0, 30))
