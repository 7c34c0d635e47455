"""The later steps of an ingest: prepared events to causal features and rows of requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from pipeline.data.ingest import base
from pipeline.data.ingest.assemble import RequestRows, iso_day
from pipeline.data.ingest.events import bucket_of, read_bucket
from pipeline.data.ingest.history import HistoryBuilder
from pipeline.data.ingest.parallel import Step
from pipeline.data.ingest.prepare import Encoders
from pipeline.data.ingest.rates import RateTable, crosses_users, entries, key_columns, place, pool
from pipeline.data.ingest.reading import Inputs, Reading
from pipeline.data.ingest.session import Sessions
from pipeline.data.ingest.similarity import Weighted
from pipeline.data.ingest.spec import Rate
from pipeline.schema import HISTORY_ITEM, DatasetSchema

__all__ = ["Inputs", "Stages"]


class Stages(Reading):
    """All steps between the flat files and the rows of requests; see `Reading` for the arguments."""

    @property
    def steps(self) -> int:
        """How many steps there are, the last of which writes the log."""
        rates = self.spec.causal.rates
        across = len(self._rates(across_users=True))
        states = len(rates) if self._previous is not None else 0
        return super().steps + across * (1 + self.buckets) + states + self.buckets + 1

    def _rates(self, *, across_users: bool) -> list[tuple[int, Rate]]:
        return [(i, r) for i, r in enumerate(self.spec.causal.rates) if crosses_users(r) == across_users]

    def cross(self) -> None:
        """Rates of keys that many users share: entries are cut by key, answered there, and handed back by user."""
        rates = self._rates(across_users=True)
        entries = (Step(f"entries-{i:02d}", f"rate {rate.name}: cutting", (rate,)) for i, rate in rates)
        self._each(entries, self._cut_entries)
        for i, rate in rates:
            self._rate_state(i, rate)
        answers = (
            Step(f"answers-{i:02d}-{b:04d}", f"rate {rate.name} {b + 1}/{self.buckets}", (i, rate, b))
            for i, rate in rates
            for b in range(self.buckets)
        )
        self._each(answers, self._answer)

    def _rate_state(self, i: int, rate: Rate) -> None:
        if self._previous is not None:
            self._once(f"state-rate-{i:02d}", f"reading the state: {rate.name}", self._cut_rate, i, rate)

    def _cut_entries(self, rate: Rate, out: Path) -> None:
        for bucket in range(self.buckets):
            self.cut_bucket(rate, bucket, out)

    def cut_bucket(self, rate: Rate, bucket: int, out: Path) -> None:
        """Entries of one bucket of users, by bucket of keys: `out/_bucket=KEYS/USERS.parquet`."""
        events = self.prepared(bucket)
        if events is None:
            return
        found = entries(self.spec, rate, events).with_columns(pl.lit(bucket, dtype=pl.Int32).alias("_bucket"))
        found = found.with_columns(self._key_bucket(rate))
        for (target,), part in found.partition_by("_target", as_dict=True, include_key=False).items():
            folder = out / f"_bucket={target}"
            folder.mkdir(exist_ok=True, parents=True)
            part.write_parquet(folder / f"{bucket:04d}.parquet")

    def _key_bucket(self, rate: Rate) -> pl.Expr:
        return bucket_of(pl.struct(pl.col(c).cast(pl.Int64) for c in key_columns(rate)), self.buckets).alias("_target")

    def _cut_rate(self, i: int, rate: Rate, out: Path) -> None:
        assert self._previous is not None
        files = self._previous.files(f"rate-{i:02d}")
        if files:
            by = bucket_of(pl.col("_key_user"), self.buckets) if "user" in rate.keys else self._key_bucket(rate)
            frame = pl.scan_parquet(files).with_columns(by.alias("_bucket"))
            frame.sink_parquet(pl.PartitionBy(out, key="_bucket", include_key=False), mkdir=True)

    def _answer(self, i: int, rate: Rate, bucket: int, out: Path) -> None:
        found = read_bucket([self.work.path(f"entries-{i:02d}")], bucket)
        carried = self.state_of(f"rate-{i:02d}", bucket)
        if found is None:
            self._keep(out, f"rate-{i:02d}", bucket, carried)
            return
        table = RateTable(self.spec, rate, found, carried)
        for (target,), part in table.answers().partition_by("_bucket", as_dict=True, include_key=False).items():
            folder = out / f"_bucket={target}"
            folder.mkdir()
            part.write_parquet(folder / f"{bucket:04d}.parquet")
        if self.keep_state:
            self._keep(out, f"rate-{i:02d}", bucket, table.state(self.carry_until, carried))

    def _keep(self, out: Path, name: str, bucket: int, part: pl.DataFrame | None) -> None:
        """Write a part of the state for a later ingest."""
        if self.keep_state and part is not None:
            folder = out / "state" / name
            folder.mkdir(parents=True)
            part.write_parquet(folder / f"{bucket:04d}.parquet")

    def assemble(self, schema: DatasetSchema) -> None:
        """Rows of requests of every bucket."""
        for i, rate in self._rates(across_users=False):
            self._rate_state(i, rate)
        self._each(self._by_bucket("requests", "building requests"), self._requests, schema)

    def _requests(self, bucket: int, schema: DatasetSchema, out: Path) -> None:
        events = self.prepared(bucket)
        if events is None:
            for name in ("before", "sessions", "similar"):
                self._keep(out, name, bucket, self.state_of(name, bucket))
            for i, _ in self._rates(across_users=False):
                self._keep(out, f"rate-{i:02d}", bucket, self.state_of(f"rate-{i:02d}", bucket))
            return
        columns = self._user_rates(bucket, events, out)
        for i, rate in self._rates(across_users=True):
            folders = [self.work.path(f"answers-{i:02d}-{b:04d}") for b in range(self.buckets)]
            answers = read_bucket(folders, bucket)
            if answers is None:
                answers = RateTable(self.spec, rate, entries(self.spec, rate, events.clear())).answers()
            columns += place(pool(self.spec, rate, answers), len(events))
        columns += self._sessions(bucket, events, out)
        columns += self._similar(bucket, events, out)
        history = self._history(bucket, events, out)
        RequestRows(self.spec, schema, events.with_columns(columns), history).write(out / "log", f"{bucket:04d}")

    def _user_rates(self, bucket: int, events: pl.DataFrame, out: Path) -> list[pl.Series]:
        columns: list[pl.Series] = []
        for i, rate in self._rates(across_users=False):
            carried = self.state_of(f"rate-{i:02d}", bucket)
            table = RateTable(self.spec, rate, entries(self.spec, rate, events), carried)
            columns += place(pool(self.spec, rate, table.answers()), len(events))
            if self.keep_state:
                self._keep(out, f"rate-{i:02d}", bucket, table.state(self.carry_until, carried))
        return columns

    def _sessions(self, bucket: int, events: pl.DataFrame, out: Path) -> list[pl.Series]:
        if self.spec.causal.session is None:
            return []
        sessions = Sessions(self.spec, events, self.state_of("sessions", bucket))
        if self.keep_state:
            self._keep(out, "sessions", bucket, sessions.state(self.carry_until))
        return sessions.features(events)

    def _similar(self, bucket: int, events: pl.DataFrame, out: Path) -> list[pl.Series]:
        if self.spec.causal.similarity is None:
            return []
        parts = [f for f in (self.prepared(bucket, "earlier"), self.state_of("similar", bucket)) if f is not None]
        earlier = pl.concat(parts, how="diagonal") if parts else None
        if earlier is None:
            earlier = pl.DataFrame(schema={"_user": pl.Int64, "_time": pl.Int64, HISTORY_ITEM: pl.Int64})
        vectors = pl.read_parquet(self.work.path("vectors") / "vectors" / "part.parquet").to_numpy()
        weighted = Weighted(self.spec, vectors, events, earlier)
        if self.keep_state:
            self._keep(out, "similar", bucket, weighted.state(self.carry_until))
        return weighted.features(events)

    def _history(self, bucket: int, events: pl.DataFrame, out: Path) -> HistoryBuilder | None:
        if self.spec.history is None:
            return None
        parts = [f for f in (self.state_of("before", bucket), self.prepared(bucket, "earlier")) if f is not None]
        earlier = pl.concat(parts, how="diagonal") if parts else None
        history = HistoryBuilder(self.spec, events, earlier)
        if self.keep_state:
            self._keep(out, "before", bucket, history.state(self.carry_until))
        return history

    def written(self) -> None:
        """The last step is done."""
        self._count(self.steps, self.steps)

    def request_folders(self) -> list[Path]:
        """Where `assemble` wrote, by bucket."""
        return [self.work.path(f"requests-{b:04d}") / "log" for b in range(self.buckets)]

    def state_folders(self, encoders: Encoders) -> list[Path]:
        """Folders that hold parts of the state as PART/*.parquet."""
        with self.work.step("state-whole") as out:
            slot = (self.carry_until - self.spec.delay_ms) // (self.spec.causal.base_resolution_s * 1000)
            whole = {"slots": base.collapse(self.slots(), slot)}
            whole |= {f"ids-{name}": ids.table for name, ids in encoders.ids.items() if ids.spec.method == "index"}
            for name, frame in whole.items():
                (out / name).mkdir()
                frame.write_parquet(out / name / "part.parquet")
        found = [self.work.path("state-whole")]
        found += [self.work.path(f"prepared-{b:04d}") for b in range(self.buckets)]
        found += [self.work.path(f"requests-{b:04d}") / "state" for b in range(self.buckets)]
        for i, _ in self._rates(across_users=True):
            found += [self.work.path(f"answers-{i:02d}-{b:04d}") / "state" for b in range(self.buckets)]
        return found + ([self.work.path("vectors")] if self.spec.causal.similarity else [])

    def provenance(self, encoders: Encoders) -> dict[str, Any]:
        """How the log was made, for people."""
        return {
            "command": "ingest",
            **self.identity,
            "last_day": iso_day(self.last_day),
            "hash_collisions": self.collisions,
            "ids": {name: ids.size for name, ids in encoders.ids.items() if not name.startswith("_")},
        }
