"""Ingest on Spark in local mode: the same rows as the embedded engine's, and what it refuses."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

from pipeline.data.ingest import ingest
from pipeline.data.ingest.load import load_spec
from pipeline.data.ingest.pieces import lay, take
from pipeline.data.ingest.row_wise import is_row_wise
from pipeline.data.ingest.run import find_inputs
from pipeline.data.ingest.spark import ingest_on_spark
from pipeline.data.ingest.spark_scan import refuse_what_spark_cannot
from pipeline.data.logs import Dataset
from pipeline.errors import ConfigError, DataError
from tests.data.ingest_logs import ITEMS, random_log, rows, spec_with
from tests.data.ingest_logs import write as write_flat
from tests.data.test_ingest_work import digest, full_spec, write_before

HAS_PYSPARK = importlib.util.find_spec("pyspark") is not None
on_spark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore"),  # PySpark's own, of pandas 3 and of sockets that its gateway leaves open
    pytest.mark.skipif(not HAS_PYSPARK, reason="pyspark is not installed: pip install 'trefoil[spark]'"),
    pytest.mark.skipif(shutil.which("java") is None, reason="there is no Java, which Spark runs on"),
]


@pytest.fixture(scope="module")
def session() -> Iterator[Any]:
    from pyspark.sql import SparkSession

    os.environ["PYSPARK_PYTHON"] = sys.executable
    settings = {"spark.ui.enabled": "false", "spark.sql.shuffle.partitions": "3", "spark.driver.host": "localhost"}
    builder = SparkSession.builder.master("local[2]")
    for name, value in settings.items():
        builder = builder.config(name, value)
    found = builder.getOrCreate()
    yield found
    found.stop()


def parquet_spec(**changes: Any) -> dict[str, Any]:
    """Every kind of feature, of a log in two Parquet files."""
    return full_spec(log={"files": ["${root}/log-*.parquet"]}, **changes)


def write(root: Path, spec: dict[str, Any], log: pl.DataFrame) -> Path:
    """The spec and its files, the log cut in two; the spec's path."""
    write_before(root)
    half = len(log) // 2
    log[:half].with_columns(unused=pl.lit("x")).write_parquet(root / "log-0.parquet", row_group_size=30)
    log[half:].with_columns(pl.col("long").cast(pl.Int8)).write_parquet(root / "log-1.parquet")
    ITEMS.write_csv(root / "items.csv")
    (root / "spec.yaml").write_text(yaml.safe_dump(spec))
    return root / "spec.yaml"


def both(root: Path, spec: dict[str, Any], log: pl.DataFrame, session: Any) -> tuple[Dataset, Dataset]:
    """The log of the embedded engine and that of Spark."""
    path, params = write(root, spec, log), {"root": str(root)}
    here = ingest(path, root / "here", params)
    there = ingest_on_spark(path, root / "there", params, session, buckets=5)
    return here, there


class TestOnSpark:
    pytestmark = on_spark

    @pytest.mark.parametrize("gap_s", [0, 60])
    def test_rows_equal_those_of_the_embedded_engine(self, tmp_path: Path, session: Any, gap_s: float) -> None:
        spec = parquet_spec(request={"gap_s": gap_s}, label_delay_s=1800)
        here, there = both(tmp_path, spec, random_log(1, 400, users=12), session)
        assert rows(there) == rows(here)
        assert len(rows(here)) > 100
        assert digest(there) == digest(here)  # vocabularies and description among them
        assert not (there.root / ".work-spark").exists()

    def test_lists_in_one_line_equal_too(self, tmp_path: Path, session: Any) -> None:
        log = (
            random_log(2, 200, users=7)
            .group_by("user", "time", "tab", maintain_order=True)
            .agg(shown=pl.format("{}-{}", "item", pl.col("click").fill_null(0)), long=pl.col("long").first())
        )
        log = log.with_columns(pl.from_epoch("time", time_unit="ms").dt.replace_time_zone("UTC").alias("time"))
        files = {
            "files": ["${root}/log-*.parquet"],
            "explode": {"column": "shown", "name": "entry", "position": "place"},
            "derive": {"item": "split_part(entry, '-', 1)", "click": "CAST(split_part(entry, '-', 2) AS INT)"},
        }
        spec = spec_with(log=files, request={"gap_s": 0, "position": "place"})
        here, there = both(tmp_path, spec, log, session)
        assert rows(there) == rows(here)
        assert digest(there) == digest(here)

    def test_a_bad_row_is_named_as_the_embedded_engine_does(self, tmp_path: Path, session: Any) -> None:
        log = random_log(3, 60).with_row_index("i")
        log = log.with_columns(long=pl.when(pl.col("i") == 41).then(7).otherwise(pl.col("long"))).drop("i")
        path, params = write(tmp_path, parquet_spec(), log), {"root": str(tmp_path)}
        said = []
        for run in (lambda out: ingest(path, out, params), lambda out: ingest_on_spark(path, out, params, session)):
            with pytest.raises(DataError, match=r"row 12 has 7\.0 for task 'long'") as caught:
                run(tmp_path / f"out-{len(said)}")
            said.append(str(caught.value))
        assert said[0] == said[1]


def test_what_spark_cannot_do_is_one_message(tmp_path: Path) -> None:
    spec = spec_with(tasks={"click": "click", "long": "long / max(long)"})
    path = write_flat(tmp_path, spec, random_log(1, 20))
    loaded = load_spec(path, {"root": str(tmp_path)})
    with pytest.raises(ConfigError) as caught:
        refuse_what_spark_cannot(loaded, find_inputs(loaded))
    said = str(caught.value)
    assert "cannot run on Spark; use `trefoil ingest`, or change:" in said
    assert "log.files: must be Parquet" in said
    assert "tasks.long: 'long / max(long)' looks at more than one row" in said
    assert "tasks.click" not in said


ROW_WISE = """click = 1; split_part(x, '-', 1); CASE WHEN a > 1 THEN 1 ELSE 0 END; CAST(a AS INT); ts // 3600 % 24
a IN (1, 2); coalesce(a, b); concat(a, 'x'); a IS NOT NULL; a LIKE 'x%'; date_part('hour', a); greatest(a, b); no SQL"""
NOT_ROW_WISE = """long / max(long); a - avg(a); count(*); first(a); row_number() over (); sum(a) over ()
rank() over (partition by a); lag(a) over (order by a); median(a); corr(a, b); quantile_cont(a, 0.5)"""


@pytest.mark.parametrize(("text", "expected"), [(ROW_WISE, True), (NOT_ROW_WISE, False)])
def test_expressions_that_look_at_more_than_their_row_are_found(text: str, expected: bool) -> None:
    for expression in text.replace("\n", "; ").split("; "):
        assert is_row_wise(expression) is expected, expression


def test_files_come_out_as_they_went_in_at_the_bucket_that_their_path_names(tmp_path: Path) -> None:
    large = bytes(range(256)) * 40_000  # more than one part
    files = {"a-0/x.parquet": large, "a-0/_done": b"", "b/_bucket=7/y.parquet": b"y", "c/other": b"not taken"}
    for name, data in files.items():
        (tmp_path / "work" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "work" / name).write_bytes(data)
    rows_of = list(take(tmp_path / "work", ("a-", "b"), 3))
    assert len(rows_of) == 4
    assert lay(rows_of, tmp_path / "laid") == [3, 7]
    laid = {
        str(p.relative_to(tmp_path / "laid")): p.read_bytes() for p in (tmp_path / "laid").rglob("*") if p.is_file()
    }
    assert laid == {"3/a-0/x.parquet": large, "3/a-0/_done": b"", "7/b/_bucket=7/y.parquet": b"y"}


def test_pyspark_is_not_imported_unless_asked_for() -> None:
    code = "import sys, pipeline.cli.ingest, pipeline.data.ingest.spark; print('pyspark' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"


@pytest.mark.skipif(HAS_PYSPARK, reason="pyspark is installed")
def test_without_pyspark_the_error_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pip install 'trefoil\[spark\]'"):
        ingest_on_spark("kuairand", tmp_path / "out", {"root": "x"}, None)
