"""`ingest`: the steps from a spec to a log, each bounded in memory and done once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.data.ingest.assemble import FILE_REQUESTS, RequestRows, merge
from pipeline.data.ingest.events import raw, read_bucket, write_earlier, write_events
from pipeline.data.ingest.history import HistoryBuilder
from pipeline.data.ingest.ids import ALWAYS, KEYS_SCHEMA, Ids, first_days, list_parts
from pipeline.data.ingest.load import load_spec
from pipeline.data.ingest.prepare import (
    SURFACES,
    Encoders,
    encode_tables,
    prepare,
    prepare_earlier,
    read_tables,
    shared_vocabularies,
)
from pipeline.data.ingest.source import find_files
from pipeline.data.ingest.spec import IngestSpec, VocabularySpec
from pipeline.data.ingest.work import Work, file_identity
from pipeline.data.logs import DESCRIPTION, Dataset, LogWriter
from pipeline.errors import DataError
from pipeline.schema import HISTORY_ITEM, DatasetSchema, Feature, Kind, Level, Vocabulary

Progress = Callable[[str], None]


def ingest(
    spec: str | Path,
    out: str | Path,
    params: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Turn flat impression logs into a request-grouped log.

    Args:
        spec: path of a spec, or name of a shipped one.
        out: folder of the log to be; must not hold one.
        params: values of the spec's parameters.
        progress: told what begins, in a few words.

    Raises:
        ConfigError: the spec or its parameters do not make sense.
        DataError: a file, column or row is not what the spec says, or `out` already holds a log.
    """
    loaded = load_spec(spec, params)
    out = Path(out)
    if (out / DESCRIPTION).exists():
        raise DataError("the folder already holds a log; choose another, or remove it first", file=str(out))
    return _Ingest(loaded, out, progress or (lambda _: None)).run()


class _Ingest:
    def __init__(self, spec: IngestSpec, out: Path, progress: Progress) -> None:
        self.spec, self.out, self.progress = spec, out, progress
        self.logs = find_files(spec.log, "log.files")
        earlier = spec.history.earlier if spec.history else None
        self.earlier = find_files(earlier, "history.earlier.files") if earlier else []
        self.side = [p for name, t in spec.tables.items() for p in find_files(t, f"tables.{name}.files")]
        self.buckets = 1
        self.identity = {
            "spec": spec.model_dump(mode="json"),
            "inputs": file_identity(self.logs + self.earlier + self.side),
            "buckets": self.buckets,
            "polars": pl.__version__,
        }
        self.work = Work(out / ".work", self.identity)

    def run(self) -> Dataset:
        self._cut()
        tables = read_tables(self.spec)
        ids = self._ids(tables)
        encoders = Encoders(ids, encode_tables(self.spec, tables, ids), shared_vocabularies(self.spec))
        schema = dataset_schema(self.spec, ids)
        for bucket in range(self.buckets):
            self._assemble(bucket, encoders, schema)
        writer = LogWriter(self.out, schema)
        folders = [self.work.path(f"requests-{b:04d}") for b in range(self.buckets)]
        merge(self.spec, folders, writer, self.progress, FILE_REQUESTS)
        for name in self.spec.vocabularies:
            if self.spec.vocabularies[name].method == "index":
                ids[name].write(self.out)
        dataset = writer.close(self._provenance())
        self.work.remove()
        return dataset

    def _cut(self) -> None:
        for i, path in enumerate(self.logs):
            if not self.work.done(f"events-{i:04d}"):
                self.progress(f"reading {path.name}")
                with self.work.step(f"events-{i:04d}") as folder:
                    write_events(self.spec, path, folder, self.buckets)
        for i, path in enumerate(self.earlier):
            if not self.work.done(f"earlier-{i:04d}"):
                self.progress(f"reading {path.name}")
                with self.work.step(f"earlier-{i:04d}") as folder:
                    write_earlier(self.spec, path, folder, self.buckets)

    def _events(self, bucket: int) -> pl.DataFrame | None:
        found = read_bucket([self.work.path(f"events-{i:04d}") for i in range(len(self.logs))], bucket)
        return None if found is None else found.with_columns(pl.lit(True).alias("_fresh"))

    def _earlier(self, bucket: int) -> pl.DataFrame | None:
        return read_bucket([self.work.path(f"earlier-{i:04d}") for i in range(len(self.earlier))], bucket)

    def _ids(self, tables: dict[str, pl.DataFrame]) -> dict[str, Ids]:
        self.progress("collecting ids")
        spec = self.spec
        keys = {name: [pl.DataFrame(schema=KEYS_SCHEMA)] for name in (*spec.vocabularies, SURFACES)}
        for bucket in range(self.buckets):
            events, earlier = self._events(bucket), self._earlier(bucket)
            if events is None:
                continue
            keys[SURFACES].append(
                first_days(events.select(pl.col("_surface").alias("key"), pl.col("_day").alias("day")))
            )
            for f in spec.features:
                if f.table is None and f.vocabulary is not None and spec.vocabularies[f.vocabulary].method != "given":
                    found = events.select(pl.col(raw(f.name)).alias("key"), pl.col("_day").alias("day"))
                    keys[f.vocabulary].append(first_days(found.explode("key") if f.is_multi else found))
            if earlier is not None and spec.history is not None:
                item = spec.feature(spec.history.features[HISTORY_ITEM]).vocabulary or ""
                found = earlier.select(pl.col("_item").alias("key"), pl.lit(ALWAYS, dtype=pl.Int32).alias("day"))
                keys[item].append(first_days(found))
        for f in spec.features:
            if f.table is not None and f.vocabulary is not None:
                values = tables[f.table][f.name]
                flat = list_parts(values)[1] if f.is_multi else values
                keys[f.vocabulary].append(
                    first_days(pl.DataFrame({"key": flat}).with_columns(pl.lit(ALWAYS, dtype=pl.Int32).alias("day")))
                )
        specs = {**spec.vocabularies, SURFACES: VocabularySpec(method="index")}
        self.keys = {name: first_days(pl.concat(found)) for name, found in keys.items()}
        return {name: Ids.build(name, how, self.keys[name]) for name, how in specs.items()}

    def _assemble(self, bucket: int, encoders: Encoders, schema: DatasetSchema) -> None:
        name = f"requests-{bucket:04d}"
        if self.work.done(name):
            return
        self.progress(f"bucket {bucket + 1} of {self.buckets}")
        with self.work.step(name) as folder:
            events = self._events(bucket)
            if events is None:
                return
            earlier = self._earlier(bucket)
            prepared = prepare(self.spec, events, encoders)
            history = None
            if self.spec.history is not None:
                before = None if earlier is None else prepare_earlier(self.spec, earlier, prepared, encoders)
                history = HistoryBuilder(self.spec, prepared, before)
            RequestRows(self.spec, schema, prepared, history).write(folder, f"bucket-{bucket:04d}")

    def _provenance(self) -> dict[str, Any]:
        return {"command": "ingest", **self.identity}


def dataset_schema(spec: IngestSpec, ids: Mapping[str, Ids]) -> DatasetSchema:
    """The schema of the log that a spec makes, given its id spaces."""
    vocabularies = [Vocabulary(name=n, size=ids[n].size, method=v.method) for n, v in spec.vocabularies.items()]
    vocabularies += [Vocabulary(name=f.name, size=len(f.buckets) + 2) for f in spec.features if f.buckets is not None]
    features = [
        Feature(
            name=f.name,
            level=Level(f.level),
            kind=Kind.NUMERIC if f.numeric else Kind.CATEGORICAL,
            surfaces=tuple(s for s in spec.surfaces if f.surfaces is None or s in f.surfaces),
            vocabulary=f.vocabulary_name,
            multi_valued=f.is_multi,
        )
        for f in spec.features
    ]
    history = spec.history.features if spec.history else {}
    features += [
        Feature(
            name=name,
            level=Level.HISTORY,
            kind=Kind.CATEGORICAL,
            surfaces=spec.surfaces,
            vocabulary=spec.feature(feature).vocabulary_name,
        )
        for name, feature in history.items()
    ]
    return DatasetSchema(
        surfaces=spec.surfaces,
        tasks=tuple(spec.tasks),
        vocabularies=tuple(vocabularies),
        features=tuple(features),
        history_length=spec.history.length if spec.history else 0,
        label_delay_ms=spec.delay_ms,
        weighted=spec.weight is not None,
    )
