"""A bucket's impressions as users' histories: what a request may know of the past, point in time."""

from __future__ import annotations

import numpy as np

from pipeline.data.simulate.config import DAY_MS, SimulationConfig
from pipeline.data.simulate.day import DayLog, ragged
from pipeline.data.simulate.schema import TASKS
from pipeline.data.simulate.world import Array

TIME_BITS = 40  # 34 years of milliseconds


class Events:
    """Impressions of one bucket's users, ordered by user and time.

    Attributes:
        item: int32 [E] ad of each event. `action`: int8 [E] code as in `history_action`.
        surface: int8 [E] code as in `history_surface`. `time_ms`: int64 [E].
    """

    def __init__(self, config: SimulationConfig, users: int) -> None:
        self._config = config
        self._users = users
        self._origin = config.start_ms - config.warmup_days * DAY_MS
        self._key = np.zeros(0, dtype=np.int64)
        self.item = np.zeros(0, dtype=np.int32)
        self.action = np.zeros(0, dtype=np.int8)
        self.surface = np.zeros(0, dtype=np.int8)

    @property
    def time_ms(self) -> Array:
        return (self._key & ((1 << TIME_BITS) - 1)) + self._origin

    def _key_of(self, user: Array, time_ms: Array) -> Array:
        return (user << TIME_BITS) | np.maximum(time_ms - self._origin, 0)

    def add(self, log: DayLog) -> None:
        """Add a day's impressions."""
        visits = log.visits
        of = np.repeat(np.arange(visits.user.size), visits.candidates)
        outcomes = np.nan_to_num(log.label).astype(np.int64)
        action = 1 + (outcomes << np.arange(len(TASKS))).sum(axis=1)
        key = np.concatenate([self._key, self._key_of(visits.user, visits.time_ms)[of]])
        order = np.argsort(key, kind="stable")
        self._key = key[order]
        self.item = np.concatenate([self.item, log.item.astype(np.int32)])[order]
        self.action = np.concatenate([self.action, action.astype(np.int8)])[order]
        self.surface = np.concatenate([self.surface, (1 + visits.surface[of]).astype(np.int8)])[order]

    def known(self, user: Array, time_ms: Array, limit: Array | int) -> tuple[Array, Array]:
        """For each request, where its history begins and how long it is: the latest `limit` events whose
        outcome was known, which is strictly before the request's time less the label delay."""
        end = np.searchsorted(self._key, self._key_of(user, time_ms - self._config.label_delay_ms))
        begin = np.searchsorted(self._key, user << TIME_BITS)
        start = np.maximum(begin, end - limit)
        return start, end - start

    def forget(self, time_ms: int) -> None:
        """Drop what no request from `time_ms` on can have in its history."""
        user = np.arange(self._users)
        start, _ = self.known(user, np.full(self._users, time_ms), self._config.history_length)
        ends = np.searchsorted(self._key, (user + 1) << TIME_BITS)
        keep = ragged(start, ends - start)
        self._key, self.item = self._key[keep], self.item[keep]
        self.action, self.surface = self.action[keep], self.surface[keep]
