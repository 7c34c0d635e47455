"""Inspecting a log counts what rows hold and reports every fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cli import main
from pipeline.data.inspect import inspect
from pipeline.data.logs import Dataset
from pipeline.data.writer import LogWriter
from pipeline.errors import DataError
from tests.data.logs import DAYS, rewrite, table, write_log

Rows = dict[tuple[str, int], dict[str, Any]]


@pytest.fixture
def log(tmp_path: Path) -> tuple[Dataset, Rows]:
    return write_log(tmp_path / "data", {"hf": 60, "sr": 24, "rp": 9})


def test_counts_are_those_of_the_rows(log: tuple[Dataset, Rows]) -> None:
    dataset, rows = log
    found = inspect(dataset.root)
    assert found.faults == ()
    hf = [row for (surface, _), row in rows.items() if surface == "hf"]
    told = found.as_dict()["surfaces"]["hf"]
    lengths = [len(row["history_item"]) for row in hf]
    candidates = [len(row["item"]) for row in hf]
    assert (told["requests"], told["impressions"]) == (60, sum(candidates))
    assert told["candidates"]["mean"] == pytest.approx(np.mean(candidates))
    assert told["candidates"]["max"] == max(candidates)
    assert told["history"]["p50"] == np.quantile(lengths, 0.5, method="inverted_cdf")
    assert told["history"]["p90"] == np.quantile(lengths, 0.9, method="inverted_cdf")
    saves = [v for row in hf for v in row["save"] if v is not None]
    assert told["labels_observed"]["save"] == len(saves)
    assert told["label_rates"]["save"] == pytest.approx(np.mean(saves))
    assert told["coverage"]["country"] == pytest.approx(np.mean([row["country"] is not None for row in hf]))
    prices = [v for row in hf for v in row["price"]]
    assert told["coverage"]["price"] == pytest.approx(np.mean([v is not None for v in prices]))
    assert told["coverage"]["topics"] == pytest.approx(np.mean([len(t) > 0 for row in hf for t in row["topics"]]))
    there = [v for v in prices if v is not None]
    assert told["ranges"]["price"] == pytest.approx([min(there), max(there)])
    assert "query" not in told["coverage"]
    assert [told["days"][d]["requests"] for d in DAYS] == [40, 20]


def spoil(dataset: Dataset) -> None:
    """Faults of four kinds in four files."""
    hf, later = (dataset.root / p.files[0].path for p in dataset.partitions("hf"))
    sr, rp = (dataset.root / dataset.partitions(s)[0].files[0].path for s in ("sr", "rp"))
    table = pq.ParquetFile(hf).read()
    hours, users = table["hour"].to_pylist(), table["user"].to_pylist()
    hours[3], users[38] = float("inf"), 99
    table = table.set_column(table.column_names.index("hour"), "hour", pa.array(hours, pa.float32()))
    pq.write_table(table.set_column(3, "user", pa.array(users, pa.int64())), hf, row_group_size=7)
    later.unlink()
    pq.write_table(pq.ParquetFile(sr).read().drop_columns(["match"]), sr, row_group_size=7)
    table = pq.ParquetFile(rp).read()
    twice = pa.array([0] * table.num_rows, pa.int64())
    pq.write_table(table.set_column(0, "request_id", twice), rp, row_group_size=7)
    for path in (hf, sr, rp):
        state(dataset.root, path)


def state(root: Path, path: Path) -> None:
    """Let dataset.json state the file's new size."""

    def change(description: dict[str, Any]) -> None:
        for partition in description["partitions"]:
            for file in partition["files"]:
                if root / file["path"] == path:
                    file["bytes"] = path.stat().st_size

    rewrite(root, change)


def test_every_fault_is_reported_and_the_status_is_1(
    log: tuple[Dataset, Rows], capsys: pytest.CaptureFixture[str]
) -> None:
    dataset, _ = log
    spoil(dataset)
    assert main(["inspect", str(dataset.root), "--json"]) == 1
    faults = json.loads(capsys.readouterr().out)["faults"]
    found = {(f["problem"].split(";")[0][:40], f["row_group"], f["column"]) for f in faults}
    assert found == {
        ("the column holds NaN or infinity", 0, "hour"),
        ("the column holds 99", 5, "user"),
        ("the description names a file that is not", None, None),
        ("the file lacks a column that dataset.jso", None, "match"),
        ("1 request ids of surface 'rp' are there ", None, "request_id"),
    }


def test_a_sound_log_prints_tables_and_the_status_is_0(
    log: tuple[Dataset, Rows], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(log[0].root)]) == 0
    shown = capsys.readouterr().out
    assert "no faults" in shown
    assert "2026-01-02" in shown


def test_rows_out_of_order_and_wrong_counts_are_faults(log: tuple[Dataset, Rows]) -> None:
    dataset, _ = log
    path = dataset.root / dataset.partitions("hf")[0].files[0].path
    table = pq.ParquetFile(path).read()
    pq.write_table(table.take(list(range(39, -1, -1))), path, row_group_size=7)
    impressions = dataset.partitions("sr")[-1].impressions
    rewrite(dataset.root, lambda d: d["partitions"][-1]["files"][0].update(impressions=impressions + 1))
    state(dataset.root, path)
    problems = [f.problem for f in inspect(dataset.root).faults]
    assert problems.count("the rows are not in order of time") == 6
    assert sum("candidates, dataset.json says" in p for p in problems) == 1


def test_a_folder_that_is_no_log_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no dataset\.json"):
        inspect(tmp_path)


def test_a_feature_that_is_the_outcome_in_disguise_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset, rows = write_log(tmp_path / "sound", {"hf": 400, "sr": 30, "rp": 9})
    assert inspect(dataset.root).giveaways == ()
    writer = LogWriter(tmp_path / "leaky", dataset.schema)
    for surface in ("hf", "sr"):
        leaky = [dict(row) for (s, _), row in rows.items() if s == surface]
        for row in leaky:
            row["price"] = [None if i == 2 else 5.0 - 3 * y for i, y in enumerate(row["click"])]
        writer.write(surface, DAYS[0], table(leaky, surface, dataset.schema))
    root = writer.close({}).root
    (found,) = inspect(root).giveaways  # of sr there are too few to say
    assert (found.surface, found.feature, found.task, found.auc) == ("hf", "price", "click", 0.0)
    assert main(["inspect", str(root)]) == 0
    assert "doubt 'price' alone tells 'click' on hf (AUC 0.000)" in capsys.readouterr().out
