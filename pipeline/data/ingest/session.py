"""Where in a session a request stands. No outcome enters, only that the user was there."""

from __future__ import annotations

import numpy as np
import polars as pl

from pipeline.data.ingest.history import Timeline
from pipeline.data.ingest.spec import IngestSpec

SESSION_FEATURES = ("session_position", "session_recency")


class Sessions:
    """Sessions of the users of one bucket, over all their impressions of the log.

    Args:
        spec: the ingest spec, with `causal.session`.
        events: prepared events.
        state: `_user`, `time` and `position` of each user's newest impression of an earlier ingest.
    """

    def __init__(self, spec: IngestSpec, events: pl.DataFrame, state: pl.DataFrame | None = None) -> None:
        assert spec.causal.session is not None
        self._gap = spec.causal.session.gap_s * 1000
        self._user, self._time = events["_user"].to_numpy(), events["_time"].to_numpy()
        position = np.zeros(len(events), np.int64)
        if state is not None and len(state):
            # What is carried goes first of its user and lends its position.
            self._user = np.concatenate([state["_user"].to_numpy(), self._user])
            self._time = np.concatenate([state["time"].to_numpy(), self._time])
            position = np.concatenate([state["position"].to_numpy(), position])
            order = np.lexsort((self._time, self._user))  # stable: the carried one stays before its equals
            self._user, self._time, position = self._user[order], self._time[order], position[order]
        n = self._user.size
        new_user = np.diff(self._user, prepend=self._user[:1] - 1) != 0
        starts = new_user | (np.diff(self._time, prepend=0) > self._gap)
        since = np.arange(n) - np.maximum.accumulate(np.where(starts, np.arange(n), 0))
        first = np.maximum.accumulate(np.where(starts, np.arange(n), 0))
        self._position = since + position[first] if n else since
        self._timeline = Timeline(self._user, self._time)

    def features(self, events: pl.DataFrame) -> list[pl.Series]:
        """Both features for every row, as float32; of use where the row is a candidate."""
        user, now = events["_user"].to_numpy(), events["_request_time"].to_numpy()
        some, newest, since = self._newest(user, now)
        position = np.where(some & (since <= self._gap), self._position[newest] + 1, 0)
        recency = np.where(some, np.log1p(since / 1000.0), np.nan)
        return [
            pl.Series("session_position", np.log1p(position).astype(np.float32)),
            pl.Series("session_recency", recency.astype(np.float32)).fill_nan(None),
        ]

    def _newest(self, user: np.ndarray, until: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        start, end = self._timeline.before(user, until)
        newest = np.maximum(end - 1, 0)
        return end > start, newest, np.where(end > start, until - self._time[newest], 0)

    def state(self, until: int) -> pl.DataFrame:
        """`_user`, `time` and `position` of each user's newest impression before a time."""
        users = np.unique(self._user)
        some, newest, _ = self._newest(users, np.full(users.size, until))
        newest = newest[some]
        return pl.DataFrame(
            {"_user": users[some], "time": self._time[newest], "position": self._position[newest]},
            schema={"_user": pl.Int64, "time": pl.Int64, "position": pl.Int64},
        )
