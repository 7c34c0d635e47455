"""Bad files are one clear error, or by choice a counted quarantine that loses nothing else."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import LoaderConfig
from pipeline.data.layout import feature_layout
from pipeline.data.loader import Loader
from pipeline.data.logs import Dataset, LogFile
from pipeline.errors import DataError
from tests.data.logs import SURFACES, write_log

Rows = dict[tuple[str, int], dict[str, Any]]
SEED = 1  # of a log whose row 15 of hf has candidates and events
BAD = "surface=hf/date=2026-01-01/part-00000.parquet"  # 40 requests in row groups of 7, 7, 7, 7, 7, 5


@pytest.fixture
def log(tmp_path: Path) -> tuple[Dataset, Rows]:
    return write_log(tmp_path / "data", {"hf": 60, "sr": 24, "rp": 9}, seed=SEED)


def loader(
    dataset: Dataset, *, rank: int = 0, world_size: int = 1, report: Path | None = None, **config: Any
) -> Loader:
    return Loader(
        dataset,
        feature_layout(dataset.schema, surfaces=SURFACES, tasks=dataset.schema.tasks),
        LoaderConfig(**{"requests_per_batch": 10, "lanes": 4, "window": 3, "prefetch_batches": 0, **config}),
        days=None,
        seed=3,
        rank=rank,
        world_size=world_size,
        quarantine_report=report,
    )


def rewrite(dataset: Dataset, change: Callable[[pa.Table], pa.Table]) -> None:
    path = dataset.root / BAD
    pq.write_table(change(pq.ParquetFile(path).read()), path, row_group_size=7)


def put(column: str, row: int, value: Any) -> Callable[[pa.Table], pa.Table]:
    """One value of one row, the others as they were."""

    def change(table: pa.Table) -> pa.Table:
        values = table[column].to_pylist()
        values[row] = value(values[row]) if callable(value) else value
        at = table.schema.get_field_index(column)
        return table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type))

    return change


def truncate(dataset: Dataset) -> None:
    path = dataset.root / BAD
    path.write_bytes(path.read_bytes()[:-100])


def damage(dataset: Dataset) -> None:
    """Bytes of the third row group's first column chunk are overwritten."""
    path = dataset.root / BAD
    start = pq.read_metadata(path).row_group(2).column(0).dictionary_page_offset
    assert start is not None
    content = bytearray(path.read_bytes())
    content[start : start + 16] = b"\xff" * 16
    path.write_bytes(bytes(content))


FAULTS: dict[str, tuple[Callable[[Dataset], Any], str, int | None, str | None]] = {
    "missing column": (lambda d: rewrite(d, lambda t: t.drop_columns(["price"])), "lacks a column", None, "price"),
    "wrong type": (
        lambda d: rewrite(d, lambda t: t.set_column(4, "country", t["country"].cast(pa.float64()))),
        "has type double, it must be int64",
        None,
        "country",
    ),
    "unequal lists": (
        lambda d: rewrite(d, put("price", 15, lambda v: [*v, 0.5])),
        "entries where 'click' has",
        2,
        "price",
    ),
    "truncated": (truncate, "cannot be decoded", None, None),
    "damaged": (damage, "the row group cannot be decoded", 2, None),
    "label": (lambda d: rewrite(d, put("click", 15, lambda v: [2.0] * len(v))), "label 2.0", 2, "click"),
    "NaN": (lambda d: rewrite(d, put("hour", 15, float("nan"))), "NaN or infinity", 2, "hour"),
    "id": (lambda d: rewrite(d, put("user", 15, 50)), "holds 50; ids of vocabulary 'user'", 2, "user"),
    "leak": (
        lambda d: rewrite(d, put("history_time_ms", 15, lambda v: [4_000_000_000_000] * len(v))),
        "the history leaks the future",
        2,
        "history_time_ms",
    ),
    "fewer rows": (lambda d: rewrite(d, lambda t: t.slice(0, 20)), r"6 requests, dataset\.json says 7", 2, None),
    "deleted": (lambda d: (d.root / BAD).unlink(), "the file is gone", None, None),
}


def usable_row(log: tuple[Dataset, Rows]) -> None:
    """The row that is spoilt has candidates and events."""
    row = log[1]["hf", 15]
    assert len(row["click"]) > 0
    assert len(row["history_item"]) > 0


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("prefetch", [0, 2])
def test_each_fault_is_one_error_with_its_place(log: tuple[Dataset, Rows], name: str, prefetch: int) -> None:
    usable_row(log)
    spoil, message, row_group, column = FAULTS[name]
    one = loader(log[0], prefetch_batches=prefetch)
    spoil(log[0])
    with pytest.raises(DataError, match=message) as caught:
        list(one.batches(0))
    assert (caught.value.file, caught.value.column) == (BAD, column)
    if row_group is not None and name != "fewer rows":
        assert caught.value.row_group == row_group


def seen(loaders: list[Loader], epoch: int = 0) -> Counter[tuple[str, int]]:
    found: Counter[tuple[str, int]] = Counter()
    for one in loaders:
        made = list(one.batches(epoch))
        assert len(made) == one.steps
        for batch in made:
            names = [SURFACES[i] for i in batch.inputs.surface_of_request.tolist()]
            found += Counter(k for k in zip(names, batch.request_id.tolist(), strict=True) if k[1] >= 0)
    return found


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("world_size", [1, 3])
def test_quarantine_leaves_out_the_row_groups_and_nothing_else(
    log: tuple[Dataset, Rows], name: str, world_size: int, tmp_path: Path
) -> None:
    spoil, _, row_group, column = FAULTS[name]
    report = tmp_path / "quarantine.jsonl"
    ranks = [
        loader(log[0], rank=r, world_size=world_size, report=report, bad_input="quarantine") for r in range(world_size)
    ]
    spoil(log[0])
    lost = range(40) if row_group is None else range(14, 40) if name == "fewer rows" else range(14, 21)
    expected = Counter(k for k in log[1] if not (k[0] == "hf" and k[1] in lost))
    assert seen(ranks) == expected
    assert sum(r.left_out.requests for r in ranks) == len(lost)
    lines = {json.dumps(json.loads(line)) for line in report.read_text().splitlines()}
    told = [json.loads(line) for line in lines]
    assert sum(line["requests"] for line in told) == len(lost)
    assert {(line["surface"], line["file"], line["column"]) for line in told} == {("hf", BAD, column)}
    assert seen(ranks, epoch=1) == expected
    assert {json.dumps(json.loads(line)) for line in report.read_text().splitlines()} == lines


def test_a_schema_that_changes_between_files_names_the_file(log: tuple[Dataset, Rows]) -> None:
    dataset = log[0]
    assert len(dataset.partitions("hf")) == 2
    rewrite(dataset, lambda t: t.set_column(3, "user", t["user"].cast(pa.int32())))
    with pytest.raises(DataError, match="has type int32, it must be int64") as caught:
        list(loader(dataset).batches(0))
    assert (caught.value.file, caught.value.column) == (BAD, "user")


def test_a_candidate_that_lacks_the_id_of_a_sequence_is_a_fault(log: tuple[Dataset, Rows]) -> None:
    usable_row(log)
    rewrite(log[0], put("item", 15, lambda v: [None] * len(v)))
    with pytest.raises(DataError, match="a candidate lacks its id") as caught:
        list(loader(log[0]).batches(0))
    assert (caught.value.row_group, caught.value.column) == (2, "item")


def test_a_row_group_that_is_not_there_is_a_fault(log: tuple[Dataset, Rows]) -> None:
    description = log[0].description
    first, *rest = description.partitions
    longer: LogFile = replace(first.files[0], row_group_rows=(*first.files[0].row_group_rows, 7))
    partitions = (replace(first, files=(longer, *first.files[1:])), *rest)
    dataset = replace(log[0], description=replace(description, partitions=partitions))
    with pytest.raises(DataError, match=r"row groups, dataset\.json says more"):
        list(loader(dataset).batches(0))
