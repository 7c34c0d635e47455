"""The simulator's main loop: bucket by bucket of users, day by day."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.logs import Dataset
from pipeline.data.simulate.config import DAY_MS, SimulationConfig
from pipeline.data.simulate.day import DayEngine
from pipeline.data.simulate.events import Events
from pipeline.data.simulate.response import calibrated_intercepts
from pipeline.data.simulate.schema import TASKS, simulation_schema
from pipeline.data.simulate.tables import TableMaker
from pipeline.data.simulate.users import Users
from pipeline.data.simulate.visits import requests_per_day_and_bucket
from pipeline.data.simulate.world import Array, World, generator, make_world
from pipeline.data.truth import TRUTH
from pipeline.data.writer import LogWriter
from pipeline.progress import Progress, untold

PILOT_REQUESTS, PILOT_DAYS, PILOT_ROUNDS = 1_500, 3, 6  # requests of a day
PILOT_STEP = 0.5  # of the way to the intercepts that a round asks for; a whole step would overshoot
ID_BITS = 32  # low bits of a request id that count the requests of a bucket's day


def simulate(out: str | Path, config: SimulationConfig, progress: Progress = untold) -> Dataset:
    """Write a log and, beside it, the probabilities from which its labels were drawn.

    The log lies in `out` (see `pipeline.data.logs`), the truths in `out/truth` (see `pipeline.data.truth`).
    The same configuration gives the same bytes on the same versions of numpy and pyarrow. Memory is about
    `config.bucket_mb`, however long the log.

    Args:
        out: folder to write; must not yet hold a log.
        config: what to simulate.
        progress: called after each day of each bucket with requests done and requests in all.

    Raises:
        ConfigError: from `SimulationConfig`, values that cannot work.
        DataError: the folder already holds a log.
    """
    schema = simulation_schema(config)
    files = _Files(LogWriter(out, schema, row_group_requests=config.row_group_requests), config)
    world = make_world(config)
    intercept = calibrate(config, world)
    sizes = np.diff(np.linspace(0, config.users, config.buckets + 1).astype(np.int64))
    volume = requests_per_day_and_bucket(config, sizes)
    done, first_user = 0, 1
    for bucket, size in enumerate(sizes.tolist()):
        users = Users(config, world, first=first_user, count=size, stream=(3, bucket))
        maker = TableMaker(config=config, schema=schema, world=world, users=users)
        events = Events(config, size)
        warm = round(config.requests / config.days * size / config.users)
        for day in range(-config.warmup_days, config.days):
            requests = warm if day < 0 else int(volume[day, bucket])
            if requests == 0:
                continue
            rng = generator(config.seed, 4, bucket, day + config.warmup_days)
            log = DayEngine(config, world, users, intercept, day, rng).run(requests)
            events.add(log)
            if day >= 0:
                first_id = (day * len(sizes) + bucket) << ID_BITS
                for surface in range(len(config.surfaces)):
                    tables = maker.make(log, events, surface=surface, day=day, first_id=first_id)
                    if tables is not None:
                        files.write(surface, day, *tables)
                done += requests
                progress(done, config.requests, "simulating")
            events.forget(config.start_ms + (day + 1) * DAY_MS)
        first_user += size
    return files.writer.close({"command": "simulate", "config": asdict(config)})


def calibrate(config: SimulationConfig, world: World) -> Array:
    """[S, T] intercepts that give the rates of the knobs, from a small population apart from the log's.

    Actions move interests, so rates move what they are measured on: the pilot, whose users are as busy as
    the log's, lasts some days and is run anew with the intercepts found.
    """
    count = int(np.clip(PILOT_REQUESTS * config.days * config.users / config.requests, 100, 5_000))
    requests = int(np.clip(count * config.requests / config.days / config.users, PILOT_REQUESTS / 2, PILOT_REQUESTS))
    intercept = np.repeat([[np.log(s.click_rate / (1 - s.click_rate))] for s in config.surfaces], len(TASKS), axis=1)
    kept = []
    for attempt in range(PILOT_ROUNDS):
        users = Users(config, world, first=1, count=count, stream=(5, attempt))
        # Every surface must be seen often enough, however rare.
        users.surface_share = np.full_like(users.surface_share, 1 / len(config.surfaces))
        rng = generator(config.seed, 6, attempt)
        # Its last day is the log's first.
        for day in range(-min(config.warmup_days, PILOT_DAYS - 1), 1):
            log = DayEngine(config, world, users, intercept, day, rng).run(requests)
        surface = np.repeat(log.visits.surface, log.visits.candidates)
        wanted = calibrated_intercepts(config, log.logits, surface)
        intercept = intercept + PILOT_STEP * (wanted - intercept)
        kept.append(intercept)
    return np.mean(kept[PILOT_ROUNDS // 2 :], axis=0)


class _Files:
    """Writes each table of the log and its truths under the same name."""

    def __init__(self, writer: LogWriter, config: SimulationConfig) -> None:
        self.writer = writer
        self._names = [s.name for s in config.surfaces]
        self._start = date.fromisoformat(config.start_date)
        self._parts: Counter[tuple[int, int]] = Counter()

    def write(self, surface: int, day: int, table: pa.Table, truth: pa.Table) -> None:
        """One part of one surface and day."""
        name, iso = self._names[surface], (self._start + timedelta(days=day)).isoformat()
        self.writer.write(name, iso, table)
        part = f"part-{self._parts[surface, day]:05d}.parquet"
        self._parts[surface, day] += 1
        path = self.writer.root / TRUTH / f"surface={name}" / f"date={iso}" / part
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(truth, path, compression="zstd")
