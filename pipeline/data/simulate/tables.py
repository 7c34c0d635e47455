"""A day of a bucket as Arrow tables: one of logs and one of truths for each surface."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.data.logs import arrow_schema
from pipeline.data.simulate.config import SimulationConfig
from pipeline.data.simulate.day import DayLog, ragged
from pipeline.data.simulate.events import Events
from pipeline.data.simulate.schema import TASKS
from pipeline.data.simulate.users import Users
from pipeline.data.simulate.world import Array, World
from pipeline.schema import (
    HISTORY_ACTION,
    HISTORY_ITEM,
    HISTORY_SURFACE,
    HISTORY_TIME_MS,
    REQUEST_ID,
    TIMESTAMP_MS,
    USER_ID,
    DatasetSchema,
)


def truth_schema() -> pa.Schema:
    """Columns of a file of truths: `request_id` and a list of probabilities for each task."""
    return pa.schema([pa.field(REQUEST_ID, pa.int64()), *(pa.field(t, pa.list_(pa.float32())) for t in TASKS)])


@dataclass(frozen=True, kw_only=True)
class TableMaker:
    """Builds the tables of one bucket's days."""

    config: SimulationConfig
    schema: DatasetSchema
    world: World
    users: Users

    def make(
        self, log: DayLog, events: Events, *, surface: int, day: int, first_id: int
    ) -> tuple[pa.Table, pa.Table] | None:
        """The log and the truths of one surface, in order of time; None without a request.

        Args:
            log: the day, all surfaces.
            events: the bucket's impressions, of this day too.
            surface: index of the surface.
            day: day of the log.
            first_id: request id of the day's first request; the others follow in the order of `log.visits`.
        """
        visits = log.visits
        rows = np.flatnonzero(visits.surface == surface)
        if rows.size == 0:
            return None
        rows = rows[np.argsort(visits.time_ms[rows], kind="stable")]
        at = ragged(visits.offsets[rows], visits.candidates[rows])
        offsets = np.concatenate([[0], np.cumsum(visits.candidates[rows])])
        columns: dict[str, pa.Array] = {
            REQUEST_ID: pa.array(first_id + rows),
            USER_ID: pa.array(self.users.ids[visits.user[rows]]),
            TIMESTAMP_MS: pa.array(visits.time_ms[rows]),
            **self._request(log, rows),
            **{name: _lists(offsets, value) for name, value in self._candidate(log, at, day).items()},
            **self._history(log, rows, events, self.config.resolved_surfaces[surface].history),
        }
        for t, task in enumerate(TASKS):
            label = log.label[at, t]
            columns[task] = _lists(offsets, pa.array(label, mask=np.isnan(label)))
        wanted = arrow_schema(self.schema, self.config.surfaces[surface].name)
        table = pa.table([columns[name] for name in wanted.names], schema=wanted)
        truths = [_lists(offsets, pa.array(log.truth[at, t])) for t in range(len(TASKS))]
        return table, pa.table([columns[REQUEST_ID], *truths], schema=truth_schema())

    def _request(self, log: DayLog, rows: Array) -> dict[str, pa.Array]:
        visits, users = log.visits, self.users
        user = visits.user[rows]
        terms = log.query[rows]
        term_offsets = np.concatenate([[0], np.cumsum((terms >= 0).sum(axis=1))])
        since = np.minimum(visits.hours_since_last[rows], np.float32(720))
        return {
            "user": pa.array(users.ids[user]),
            "age_bucket": pa.array(1 + users.age[user], mask=users.age_missing[user]),
            "country": pa.array(1 + users.country[user]),
            "device": pa.array(1 + users.device[user]),
            "hour": pa.array(1 + visits.time_ms[rows] // 3_600_000 % 24),
            "tenure_days": pa.array(users.tenure_days(user, visits.time_ms[rows])),
            "hours_since_last": pa.array(since, mask=np.isnan(since)),
            "session_position": pa.array(visits.position[rows].astype(np.float32)),
            "query": _lists(term_offsets, pa.array(1 + terms[terms >= 0])),
            "related_item": pa.array(1 + log.related[rows]),
        }

    def _candidate(self, log: DayLog, at: Array, day: int) -> dict[str, pa.Array]:
        world = self.world
        item = log.item[at]
        both = np.stack([world.topic[item], world.second[item]], axis=1)
        topic_offsets = np.concatenate([[0], np.cumsum((both >= 0).sum(axis=1))])
        return {
            "item": pa.array(1 + item),
            "advertiser": pa.array(1 + world.advertiser[item]),
            "category": pa.array(1 + world.topic[item]),
            "topics": _lists(topic_offsets, pa.array(1 + both[both >= 0])),
            "format": pa.array(1 + world.format[item]),
            "price": pa.array(world.price[item], mask=world.price_missing[item]),
            "ad_age_days": pa.array((day - world.start_day[item]).astype(np.float32)),
            "creative_score": pa.array(world.creative_score[item]),
            "match_score": pa.array(log.match_score[at]),
        }

    def _history(self, log: DayLog, rows: Array, events: Events, limit: int) -> dict[str, pa.Array]:
        start, length = events.known(log.visits.user[rows], log.visits.time_ms[rows], limit)
        at = ragged(start, length)
        offsets = np.concatenate([[0], np.cumsum(length)])
        item = events.item[at].astype(np.int64)
        values = {
            HISTORY_ITEM: pa.array(1 + item),
            "history_category": pa.array(1 + self.world.topic[item]),
            "history_advertiser": pa.array(1 + self.world.advertiser[item]),
            HISTORY_ACTION: pa.array(events.action[at]),
            HISTORY_SURFACE: pa.array(events.surface[at]),
            HISTORY_TIME_MS: pa.array(events.time_ms[at]),
        }
        return {name: _lists(offsets, value) for name, value in values.items()}


def _lists(offsets: Array, values: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values)
