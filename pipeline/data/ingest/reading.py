"""The first steps of an ingest: flat files to prepared events, cut by user.

Each bucket of each step is written once and found again after a restart.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import polars as pl

from pipeline.data.ingest import base
from pipeline.data.ingest.events import bucket_of, raw, read_bucket, write_earlier, write_events
from pipeline.data.ingest.ids import ALWAYS, KEYS_SCHEMA, Ids, first_days, list_parts
from pipeline.data.ingest.parallel import Processes, Step
from pipeline.data.ingest.prepare import (
    SURFACES,
    Encoders,
    encode_tables,
    prepare,
    prepare_earlier,
    read_tables,
    shared_vocabularies,
)
from pipeline.data.ingest.rates import with_residuals
from pipeline.data.ingest.similarity import chosen_slices, item_vectors, slice_of
from pipeline.data.ingest.source import ROW
from pipeline.data.ingest.spec import IngestSpec, VocabularySpec
from pipeline.data.ingest.state import State, end_of
from pipeline.data.ingest.work import POLL_S, Work, file_identity
from pipeline.errors import DataError
from pipeline.schema import HISTORY_ITEM

_BY_USER = ("tail", "before", "sessions", "similar")  # parts of the state that lie by user


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Files that a spec names."""

    logs: list[Path]
    earlier: list[Path]
    tables: list[Path]


def identity_of(spec: IngestSpec, inputs: Inputs, previous: State | None) -> dict[str, Any]:
    """What the log that is made depends on."""
    return {
        "spec": spec.model_dump(mode="json"),
        "inputs": file_identity(inputs.logs + inputs.earlier + inputs.tables),
        "previous": None if previous is None else file_identity([previous.folder / "state.json"]),
    }


class Reading:
    """From flat files to prepared events.

    Args:
        spec: what the files mean.
        inputs: the files.
        folder: for unfinished work.
        buckets: how many parts to cut the users (and keys) into.
        previous: state of an earlier ingest to go on from.
        keep_state: whether to write the state for a later one.
        progress: told what begins, or has been done by one of several processes.
        count: told how many steps are done, and of how many.
        processes: that handle buckets; this one alone if left out.
        alone: whether no other worker is in the folder.
    """

    def __init__(
        self,
        spec: IngestSpec,
        inputs: Inputs,
        folder: Path,
        *,
        buckets: int,
        previous: State | None,
        keep_state: bool,
        progress: Callable[[str], None],
        count: Callable[[int, int], None] | None = None,
        processes: Processes | None = None,
        alone: bool = True,
    ) -> None:
        self.spec, self.inputs, self.buckets, self._processes = spec, inputs, buckets, processes or Processes(1)
        self._previous, self.keep_state, self.progress = previous, keep_state, progress
        self._count, self._counted = count or _uncounted, 0
        self.identity = identity_of(spec, inputs, previous)
        polars = pl.__version__  # its hash cuts the buckets
        self.work = Work(
            folder, {**self.identity, "buckets": buckets, "keep_state": keep_state, "polars": polars}, alone=alone
        )

    @property
    def steps(self) -> int:
        """How many steps there are."""
        parts = len(_BY_USER) if self._previous is not None else 0
        vectors = self.spec.causal.similarity is not None
        return len(self.inputs.logs) + len(self.inputs.earlier) + parts + 2 * self.buckets + vectors

    def _once(self, name: str, what: str, write: Callable[..., None], *arguments: Any) -> None:
        """Do a step unless it was done: `write` gets the arguments and, last, the folder to write into."""
        self._one_by_one([Step(name, what, arguments)], write)

    def _one_by_one(self, steps: Iterable[Step], write: Callable[..., None], *shared: Any) -> None:
        """Do steps in this process, those apart that others are at; wait for these."""
        for todo in self._rounds(steps):
            for step in todo:
                with self.work.claimed(step.name) as mine:
                    if mine:
                        self.progress(step.what)
                        with self.work.step(step.name) as folder:
                            write(*step.arguments, *shared, folder)
                        self._count_one()

    def _each(self, steps: Iterable[Step], write: Callable[..., None], *shared: Any) -> None:
        """Do steps that do not depend on each other: `write` gets a step's arguments, `shared`, and the folder."""
        steps = list(steps)
        if self._processes.jobs == 1 or len(steps) == 1:
            self._one_by_one(steps, write, *shared)
            return
        for todo in self._rounds(steps):
            self._processes.run(partial(_do, self, write.__name__, shared), todo, self._done_by_a_process)

    def _done_by_a_process(self, what: str) -> None:
        self.progress(what)
        self._count_one()

    def _count_one(self) -> None:
        self._counted += 1
        self._count(self._counted, self.steps)

    def _rounds(self, steps: Iterable[Step]) -> Iterator[list[Step]]:
        """Steps that are not done, until all are: those that another worker is at come again in the next round."""
        steps, before, again = list(steps), self._counted, False
        while todo := [step for step in steps if not self.work.done(step.name)]:
            if again:
                time.sleep(POLL_S)
            again = True
            self._counted = before + len(steps) - len(todo)
            yield todo
        self._counted = before + len(steps)
        self._count(self._counted, self.steps)

    def _by_bucket(self, name: str, what: str) -> Iterator[Step]:
        for bucket in range(self.buckets):
            yield Step(f"{name}-{bucket:04d}", f"{what} {bucket + 1}/{self.buckets}", (bucket,))

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "progress": _silent,
            "_count": _uncounted,
            "_processes": Processes(1),
        }  # these stay where they are

    def at(self, folder: Path) -> Self:
        """The same steps in another folder, which is emptied."""
        there = copy.copy(self)
        there.work = Work(folder, {})
        return there

    def cut(self) -> None:
        """Read every input once and cut it by user."""
        after = None if self._previous is None else self._previous.last_day
        logs = (
            Step(f"events-{i:05d}", f"reading {path}", (self.spec, path, self.buckets, after))
            for i, path in enumerate(self.inputs.logs)
        )
        self._one_by_one(logs, write_events)
        before = (
            Step(f"earlier-{i:05d}", f"reading {path}", (self.spec, path, self.buckets))
            for i, path in enumerate(self.inputs.earlier)
        )
        self._one_by_one(before, write_earlier)
        for name in _BY_USER if self._previous is not None else ():
            self._once(f"state-{name}", f"reading the state: {name}", self._cut_state, name)

    def _cut_state(self, name: str, out: Path) -> None:
        assert self._previous is not None
        files = self._previous.files(name)
        if files:
            frame = pl.scan_parquet(files).with_columns(bucket_of(pl.col("_user"), self.buckets))
            frame.sink_parquet(pl.PartitionBy(out, key="_bucket", include_key=False), mkdir=True)

    def state_of(self, name: str, bucket: int) -> pl.DataFrame | None:
        """A part of the previous state for the users (or keys) of a bucket."""
        return None if self._previous is None else read_bucket([self.work.path(f"state-{name}")], bucket)

    def _events(self, bucket: int) -> pl.DataFrame | None:
        """New events, marked fresh, and those of the previous state's tail."""
        folders = [self.work.path(f"events-{i:05d}") for i in range(len(self.inputs.logs))]
        new, tail = read_bucket(folders, bucket), self.state_of("tail", bucket)
        parts = [f.with_columns(_fresh=pl.lit(fresh)) for f, fresh in ((tail, False), (new, True)) if f is not None]
        return pl.concat(parts, how="vertical_relaxed") if parts else None

    def _earlier(self, bucket: int) -> pl.DataFrame | None:
        """Earlier events of users that the previous ingests have not seen."""
        folders = [self.work.path(f"earlier-{i:05d}") for i in range(len(self.inputs.earlier))]
        before = self.state_of("before", bucket)
        seen = pl.DataFrame(schema={"_user": pl.Int64}) if before is None else before.select("_user")
        parts = []
        for folder in folders:  # the first file that has a user counts
            found = read_bucket([folder], bucket)
            if found is not None:
                found = found.drop(ROW)
                parts.append(found.join(seen, on="_user", how="anti", maintain_order="left"))
                seen = pl.concat([seen, found.select("_user")]).unique()
        return pl.concat(parts, how="vertical_relaxed") if parts else None

    def encoders(self) -> Encoders:
        """Id spaces and encoded side tables, after one look at every key of the log."""
        self.cut()
        self._each(self._by_bucket("keys", "collecting ids"), self._keys)
        folders = [self.work.path(f"keys-{b:04d}") for b in range(self.buckets)]
        tables = read_tables(self.spec)
        ids, self.collisions = {}, {}
        for name, how in {**self.spec.vocabularies, SURFACES: VocabularySpec(method="index")}.items():
            parts = [pl.read_parquet(f / f"{name}.parquet") for f in folders if (f / f"{name}.parquet").exists()]
            keys = first_days(pl.concat([pl.DataFrame(schema=KEYS_SCHEMA), *self._table_keys(name, tables), *parts]))
            known = None if self._previous is None else self._previous.read(f"ids-{name}")
            ids[name] = Ids.build(name, how, keys, known)
            if how.method == "hash":
                self.collisions[name] = ids[name].hash_collisions(keys)
        return Encoders(ids, encode_tables(self.spec, tables, ids), shared_vocabularies(self.spec))

    def _table_keys(self, vocabulary: str, tables: dict[str, pl.DataFrame]) -> list[pl.DataFrame]:
        found = []
        for f in self.spec.features:
            if f.table is not None and f.vocabulary == vocabulary:
                values = tables[f.table][f.name]
                flat = list_parts(values)[1] if f.is_multi else values
                found.append(_keys_of(flat))
        return found

    def _keys(self, bucket: int, out: Path) -> None:
        """Keys with their first day, base rates by step, and the last day, of one bucket of new events."""
        spec, events, earlier = self.spec, self._events(bucket), self._earlier(bucket)
        if events is None or not len(events := events.filter(pl.col("_fresh"))):
            return
        keys: dict[str, list[pl.DataFrame]] = {SURFACES: [_keys_of(events["_surface"], events["_day"])]}
        for f in spec.features:
            if f.table is None and f.vocabulary is not None and spec.vocabularies[f.vocabulary].method != "given":
                values, day = events[raw(f.name)], events["_day"]
                if f.is_multi:
                    offsets, values = list_parts(values)
                    day = day[np.repeat(np.arange(len(day)), np.diff(offsets))]
                keys.setdefault(f.vocabulary, []).append(_keys_of(values, day))
        if earlier is not None and spec.history is not None:
            item = spec.feature(spec.history.features[HISTORY_ITEM]).vocabulary or ""
            seen = earlier.join(events.select("_user").unique(), on="_user", how="semi")
            keys.setdefault(item, []).append(_keys_of(seen["_item"]))
        for name, found in keys.items():
            first_days(pl.concat(found)).write_parquet(out / f"{name}.parquet")
        base.slots(spec, events).write_parquet(out / "slots.parquet")
        events.select(pl.col("_day").max()).write_parquet(out / "last_day.parquet")

    def _gathered(self, name: str) -> list[pl.DataFrame]:
        paths = [self.work.path(f"keys-{b:04d}") / f"{name}.parquet" for b in range(self.buckets)]
        found = [pl.read_parquet(p) for p in paths if p.exists()]
        if not found:
            raise DataError(
                "no row of the log lies in the days that are to be ingested", file=", ".join(self.spec.log.files)
            )
        return found

    @property
    def last_day(self) -> int:
        """The last day that has an event, days since 1970."""
        return int(pl.concat(self._gathered("last_day"))["_day"].max())  # type: ignore[arg-type]

    @property
    def carry_until(self) -> int:
        """What happened before this time is known to every later day: it is condensed in the state."""
        return end_of(self.spec, self.last_day) - self.spec.delay_ms

    def slots(self) -> pl.DataFrame:
        """Outcomes by raw surface and step of all ingests so far."""
        known = None if self._previous is None else self._previous.read("slots")
        return base.add_slots(self._gathered("slots") + ([] if known is None else [known]))

    def base_rates(self, encoders: Encoders) -> base.BaseRates:
        """Base rates of all ingests so far."""
        table = self.slots()
        codes = encoders.ids[SURFACES].encode(table["_surface"])
        return base.BaseRates(self.spec, table.with_columns(codes.alias("_surface")))

    def prepare(self, encoders: Encoders) -> None:
        """Order, group and encode every bucket, and take residuals against the base rates."""
        self._each(self._by_bucket("prepared", "preparing"), self._prepare, encoders, self.base_rates(encoders))
        if self.spec.causal.similarity is not None:
            self._once("vectors", "item vectors", self._vectors, encoders)

    def _prepare(self, bucket: int, encoders: Encoders, rates: base.BaseRates, out: Path) -> None:
        events, earlier = self._events(bucket), self._earlier(bucket)
        if events is None:
            return
        ready = prepare(self.spec, events, encoders)
        with_residuals(self.spec, ready, rates).write_parquet(out / "events.parquet")
        if earlier is not None:
            prepare_earlier(self.spec, earlier, ready, encoders).write_parquet(out / "earlier.parquet")
        if self.keep_state:
            (out / "tail").mkdir()
            late = events.filter(pl.col("_time") >= self.carry_until).drop("_fresh")
            late.write_parquet(out / "tail" / f"{bucket:04d}.parquet")

    def prepared(self, bucket: int, name: str = "events") -> pl.DataFrame | None:
        """Prepared events (or `earlier` ones) of a bucket."""
        path = self.work.path(f"prepared-{bucket:04d}") / f"{name}.parquet"
        return pl.read_parquet(path) if path.exists() else None

    def _pairs(self) -> Iterator[pl.DataFrame]:
        """User and item of earlier events, by bucket."""
        for bucket in range(self.buckets):
            path = self.work.path(f"prepared-{bucket:04d}") / "earlier.parquet"
            if path.exists():
                yield pl.read_parquet(path, columns=["_user", HISTORY_ITEM]).select(user="_user", item=HISTORY_ITEM)

    def _vectors(self, encoders: Encoders, out: Path) -> None:
        assert self.spec.causal.similarity is not None
        assert self.spec.history is not None
        item = encoders.ids[self.spec.feature(self.spec.history.features[HISTORY_ITEM]).vocabulary or ""]
        known = None if self._previous is None else self._previous.read("vectors")
        if known is not None:  # items that came later have none: vectors never change once candidates used them
            vectors = np.zeros((item.size, len(known.columns)), np.float32)
            vectors[: len(known)] = known.to_numpy()
        else:
            counts = np.zeros(4096, np.int64)
            for found in self._pairs():
                counts += np.bincount(slice_of(found["user"].to_numpy()), minlength=4096)
            chosen = chosen_slices(counts)
            pairs = [found.filter(pl.Series(chosen[slice_of(found["user"].to_numpy())])) for found in self._pairs()]
            empty = pl.DataFrame(schema={"user": pl.Int64, "item": pl.Int64})
            vectors = item_vectors(pl.concat([empty, *pairs]), item.size, self.spec.causal.similarity.dimension)
        (out / "vectors").mkdir()
        pl.DataFrame(vectors).write_parquet(out / "vectors" / "part.parquet")


def _silent(what: str) -> None:
    """Progress that nobody reads."""


def _uncounted(done: int, total: int) -> None:
    """Steps that nobody counts."""


def _do(reading: Reading, write: str, shared: tuple[Any, ...], step: Step) -> None:
    with reading.work.claimed(step.name) as mine:
        if mine:
            with reading.work.step(step.name) as folder:
                getattr(reading, write)(*step.arguments, *shared, folder)


def _keys_of(keys: pl.Series, day: pl.Series | None = None) -> pl.DataFrame:
    days = pl.repeat(ALWAYS, len(keys), dtype=pl.Int32, eager=True) if day is None else day
    return first_days(pl.DataFrame({"key": keys.cast(pl.String), "day": days}))
