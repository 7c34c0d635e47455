"""The same spec on Spark, for logs that one machine takes too long for. See docs/data.md.

Spark reads the files, brings each bucket's rows together and moves what buckets have for each other; what
happens to a bucket is the code of the embedded engine, in a folder of the executor's own disk.
"""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.data.ingest import base
from pipeline.data.ingest.assemble import file_requests, merge
from pipeline.data.ingest.describe import dataset_schema
from pipeline.data.ingest.load import load_spec
from pipeline.data.ingest.pieces import SCHEMA, lay, take
from pipeline.data.ingest.prepare import Encoders
from pipeline.data.ingest.run import bucket_count, find_inputs
from pipeline.data.ingest.spark_scan import (
    READ_EARLIER,
    READ_EVENTS,
    lay_events,
    refuse_bad_rows,
    refuse_what_spark_cannot,
    scan_on_spark,
)
from pipeline.data.ingest.spec import IngestSpec
from pipeline.data.ingest.stages import Stages
from pipeline.data.logs import DESCRIPTION, Dataset
from pipeline.data.writer import LogWriter
from pipeline.errors import ConfigError, DataError
from pipeline.schema import DatasetSchema

_WORK = ".work-spark"
_DAY = r"(surface=[^/]+/date=[^/]+)/"
_VECTORS = "vectors/vectors/part.parquet"


def ingest_on_spark(
    spec: str | Path,
    out: str | Path,
    params: Mapping[str, str] | None,
    session: Any,
    *,
    memory_gb: float = 4.0,
    buckets: int | None = None,
) -> Dataset:
    """Turn flat impression logs into a request-grouped log, row by row the one that `ingest` makes.

    Args:
        spec, params: as for `ingest`.
        out: folder of the log to be, at the same path on the driver and on every executor, as the flat files are.
        session: a SparkSession of Spark 4 or later whose workers can import this package.
        memory_gb: about how much memory a Python worker may use; decides the number of buckets.
        buckets: that number, where it shall be another. The result does not depend on it.

    Raises:
        ConfigError: pyspark is missing, or the spec does not make sense or needs the embedded engine.
        DataError: a file, column or row is not what the spec says, or `out` already holds a log. What is first
            noticed on an executor arrives as Spark's own error, with the sentence in it.
    """
    _require_pyspark()
    loaded = load_spec(spec, params)
    out = Path(out).resolve()
    if (out / DESCRIPTION).exists():
        raise DataError("the folder already holds a log; choose another, or remove it first", file=str(out))
    inputs = find_inputs(loaded)
    refuse_what_spark_cannot(loaded, inputs)
    count = max(bucket_count(loaded, inputs.logs, memory_gb), session.sparkContext.defaultParallelism)
    shutil.rmtree(out / _WORK, ignore_errors=True)
    steps = SparkSteps(
        loaded,
        inputs,
        out / _WORK,
        buckets=buckets or count,
        previous=None,
        keep_state=False,
        progress=lambda _: None,
    )
    kept: list[Any] = []
    try:
        return _run(steps, out, session, kept)
    finally:
        for frame in kept:
            frame.unpersist()
        shutil.rmtree(out / _WORK, ignore_errors=True)


def _require_pyspark() -> None:
    try:
        import pyspark
    except ModuleNotFoundError as error:
        raise ConfigError("pyspark is not installed; install it with: pip install 'trefoil[spark]'") from error
    if int(pyspark.__version__.split(".")[0]) < 4:
        raise ConfigError(f"pyspark is {pyspark.__version__}; ingest needs 4 or later")


def _run(steps: SparkSteps, out: Path, session: Any, kept: list[Any]) -> Dataset:
    spec = steps.spec
    events = _cut(steps, session, kept)
    steps.fetch(_each(events, steps, SparkSteps.keys, None, ("keys-",)))
    encoders = steps.encoders()
    schema = dataset_schema(spec, encoders.ids)
    share = session.sparkContext.broadcast
    prepared = _each(
        events, steps, SparkSteps.ready, share((encoders, steps.base_rates(encoders))), ("prepared-", "entr")
    )
    prepared = _keep(prepared, kept)
    vectors = b""
    if spec.causal.similarity is not None:
        steps.fetch(prepared.filter("name like '%/earlier.parquet'"))
        steps.vectors(encoders)
        vectors = (steps.work.folder / _VECTORS).read_bytes()
    answers = _each(
        _together(prepared.filter("name like 'entries-%'"), steps), steps, SparkSteps.answer, None, ("answ",)
    )
    mine = prepared.filter("name like 'prepared-%'").unionByName(answers)
    made = _each(_together(mine, steps), steps, SparkSteps.rows, share((schema, vectors)), ("requests-",))
    by_day = made.selectExpr("0 as bucket", "name", "part", "data", f"regexp_extract(name, '{_DAY}', 1) as day")
    by_day = by_day.repartition(int(session.conf.get("spark.sql.shuffle.partitions")), "day").drop("day")
    merged = by_day.sortWithinPartitions("name", "part").mapInArrow(
        partial(_merge, spec=spec, schema=schema, out=steps.work.folder), "root string"
    )
    writer = LogWriter(out, schema)
    for row in merged.collect():
        writer.adopt(Dataset.open(row.root))
    for name, how in spec.vocabularies.items():
        if how.method == "index":
            encoders.ids[name].write(out)
    return writer.close(steps.provenance(encoders))


class SparkSteps(Stages):
    """The steps of an ingest, each of one bucket, whose input Spark has laid into the folder of the work."""

    def cut(self) -> None:
        """Nothing: Spark has."""

    def fetch(self, pieces: Any) -> None:
        """Bring small files from the executors to the driver."""
        with tempfile.TemporaryDirectory(dir=self.work.folder) as folder:
            for row in pieces.toLocalIterator(prefetchPartitions=True):
                path = Path(folder) / row.name
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("ab") as file:
                    file.write(row.data)
            for path in Path(folder).iterdir():
                path.rename(self.work.path(path.name))

    def keys(self, bucket: int, _: None) -> None:
        """Keys, base rates by step and last day of a bucket."""
        with self.work.step(f"keys-{bucket:04d}") as out:
            self._keys(bucket, out)

    def ready(self, bucket: int, shared: tuple[Encoders, base.BaseRates]) -> None:
        """Prepared events of a bucket, and their entries for the buckets of keys."""
        with self.work.step(f"prepared-{bucket:04d}") as out:
            self._prepare(bucket, *shared, out)
        for i, rate in self._rates(across_users=True):
            with self.work.step(f"entries-{i:02d}") as out:
                self.cut_bucket(rate, bucket, out)

    def vectors(self, encoders: Encoders) -> None:
        """Item vectors, from the earlier events that `fetch` brought."""
        with self.work.step("vectors") as out:
            self._vectors(encoders, out)

    def answer(self, bucket: int, _: None) -> None:
        """Answers of a bucket of keys for the buckets of users."""
        for i, rate in self._rates(across_users=True):
            with self.work.step(f"answers-{i:02d}-{bucket:04d}") as out:
                self._answer(i, rate, bucket, out)

    def rows(self, bucket: int, shared: tuple[DatasetSchema, bytes]) -> None:
        """Rows of requests of a bucket."""
        schema, vectors = shared
        path = self.work.folder / _VECTORS
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(vectors)
        with self.work.step(f"requests-{bucket:04d}") as out:
            self._requests(bucket, schema, out)


def _cut(steps: SparkSteps, session: Any, kept: list[Any]) -> Any:
    """Pieces of every bucket's events, read once."""
    spec, inputs, n = steps.spec, steps.inputs, steps.buckets
    events = scan_on_spark(spec, spec.log, inputs.logs, READ_EVENTS, n, session)
    events = _keep(events.repartition(n, "_bucket"), kept)
    refuse_bad_rows(spec, events, inputs.logs)
    pieces = events.mapInArrow(partial(_laid, name="events"), SCHEMA)
    if spec.history is not None and spec.history.earlier is not None:
        earlier = scan_on_spark(spec, spec.history.earlier, inputs.earlier, READ_EARLIER, n, session)
        earlier = earlier.repartition(n, "_bucket").mapInArrow(partial(_laid, name="earlier"), SCHEMA)
        pieces = pieces.unionByName(earlier)
    return _keep(_together(pieces, steps), kept)


def _keep(frame: Any, kept: list[Any]) -> Any:
    from pyspark import StorageLevel

    kept.append(frame.persist(StorageLevel.DISK_ONLY))
    return kept[-1]


def _together(pieces: Any, steps: SparkSteps) -> Any:
    """A bucket's pieces in one partition, each file's in order."""
    return pieces.repartition(steps.buckets, "bucket").sortWithinPartitions("bucket", "name", "part")


def _each(
    pieces: Any, steps: SparkSteps, step: Callable[[SparkSteps, int, Any], None], shared: Any, results: tuple[str, ...]
) -> Any:
    """Do a step for every bucket on the executors; the pieces of the folders that it made."""
    return pieces.mapInArrow(partial(_bucket, steps=steps, step=step, shared=shared, results=results), SCHEMA)


def _bucket(
    batches: Iterable[pa.RecordBatch],
    *,
    steps: SparkSteps,
    step: Callable[[SparkSteps, int, Any], None],
    shared: Any,
    results: tuple[str, ...],
) -> Iterator[pa.RecordBatch]:
    with tempfile.TemporaryDirectory(prefix="trefoil-") as folder:
        laid = Path(folder) / "laid"
        for bucket in lay(batches, laid):
            work = Path(folder) / "work"
            there = steps.at(work)
            for arrived in (laid / str(bucket)).iterdir():
                arrived.rename(work / arrived.name)
            step(there, bucket, None if shared is None else shared.value)
            yield from take(work, results, bucket)
            shutil.rmtree(work)


def _laid(batches: Iterable[pa.RecordBatch], *, name: str) -> Iterator[pa.RecordBatch]:
    with tempfile.TemporaryDirectory(prefix="trefoil-") as folder:
        for bucket in lay_events(batches, Path(folder), name):
            yield from take(Path(folder) / str(bucket), (f"{name}-",), bucket)


def _merge(
    batches: Iterable[pa.RecordBatch], *, spec: IngestSpec, schema: DatasetSchema, out: Path
) -> Iterator[pa.RecordBatch]:
    """Write the surfaces and days of a partition as a log of its own, to be moved in by the driver."""
    with tempfile.TemporaryDirectory(prefix="trefoil-") as folder:
        if not lay(batches, Path(folder)):
            return
        buckets = sorted((Path(folder) / "0").glob("requests-*/log"))
        if not buckets:
            return
        root = out / f"days-{uuid.uuid4().hex}"  # a task may run twice; only what it reports counts
        writer = LogWriter(root, schema)
        merge(spec, buckets, writer, lambda _: None, file_requests(schema))
        writer.close({})
        yield pa.RecordBatch.from_pydict({"root": [str(root)]})
