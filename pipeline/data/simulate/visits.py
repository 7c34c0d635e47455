"""Who asks, when and where: the requests of one bucket of users on one day."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.data.simulate.config import DAY_MS, SimulationConfig
from pipeline.data.simulate.users import NEVER, Users
from pipeline.data.simulate.world import Array, generator

SESSION_REQUESTS = 4.0  # mean requests of a session
SHORTEST_GAP_S, MEAN_EXTRA_GAP_S = 75.0, 120.0  # between requests of a session
SESSION_BREAK_MS = 30 * 60_000  # a longer gap starts a new session
STICKY = 0.5  # probability that a request stays on the surface of the one before it
HOUR_WEIGHT = np.array([2, 1, 1, 1, 1, 2, 3, 4, 5, 5, 5, 5, 6, 6, 5, 5, 5, 6, 7, 8, 9, 9, 7, 4], dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class Visits:
    """Requests ordered by user and time. N requests.

    Args:
        user: [N] position in the bucket.
        time_ms: [N].
        surface: [N].
        rank: [N] how many requests of the same user came before on this day.
        position: [N] how many came before in the session.
        hours_since_last: [N] since the user's request before; NaN for the very first.
        candidates: [N] number of candidates.
    """

    user: Array
    time_ms: Array
    surface: Array
    rank: Array
    position: Array
    hours_since_last: Array
    candidates: Array

    @property
    def offsets(self) -> Array:
        """[N + 1] where the candidates of each request begin."""
        return np.concatenate([[0], np.cumsum(self.candidates)])


def requests_per_day_and_bucket(config: SimulationConfig, sizes: Array) -> Array:
    """[days, buckets] numbers of requests; they add up to `config.requests`."""
    rng = generator(config.seed, 2)
    share = np.tile(sizes / sizes.sum() / config.days, config.days)
    return rng.multinomial(config.requests, share).reshape(config.days, sizes.size)


def make_visits(config: SimulationConfig, users: Users, *, day: int, requests: int, rng: np.random.Generator) -> Visits:
    """Draw the requests of a day: users by activity, then their sessions, times and surfaces."""
    weight = np.cumsum(users.activity * users.alive(day))
    if weight[-1] == 0:
        raise AssertionError("a bucket without users was asked for requests")
    drawn = np.searchsorted(weight, rng.random(requests) * weight[-1], side="right")
    user = np.sort(np.minimum(drawn, users.ids.size - 1))
    new_user = np.diff(user, prepend=-1) != 0
    new_session = new_user | (rng.random(requests) < 1 / SESSION_REQUESTS)
    time_ms = config.start_ms + day * DAY_MS + _time_of_day(rng, new_session)
    surface = _surfaces(users, user, new_session, rng)
    order = np.lexsort((time_ms, user))
    time_ms, surface = time_ms[order], surface[order]
    rank = _since(new_user)
    before = np.where(new_user, users.last_ms[user], np.roll(time_ms, 1))
    gap = time_ms - before
    hours = np.where(before == NEVER, np.nan, gap / 3_600_000)
    return Visits(
        user=user,
        time_ms=time_ms,
        surface=surface,
        rank=rank,
        position=_since(new_user | (gap > SESSION_BREAK_MS)),
        hours_since_last=hours.astype(np.float32),
        candidates=_candidate_counts(config, surface, rng),
    )


def _since(start: Array) -> Array:
    """Entries since the latest True, which is 0."""
    at = np.arange(start.size)
    return at - np.maximum.accumulate(np.where(start, at, 0))


def _time_of_day(rng: np.random.Generator, new_session: Array) -> Array:
    """Milliseconds since midnight of each request; those of one session follow one another."""
    session = np.cumsum(new_session) - 1
    first = np.flatnonzero(new_session)
    gap = SHORTEST_GAP_S + rng.exponential(MEAN_EXTRA_GAP_S, size=session.size)
    elapsed = np.cumsum(np.where(new_session, 0.0, gap))
    elapsed -= elapsed[first][session]
    length = np.maximum.reduceat(elapsed, first)
    hour = rng.choice(24, size=first.size, p=HOUR_WEIGHT / HOUR_WEIGHT.sum())
    start = (hour + rng.random(first.size)) * 3600
    start = np.maximum(np.minimum(start, 86_399 - length), 0)
    return np.minimum((start[session] + elapsed) * 1000, DAY_MS - 1).astype(np.int64)


def _surfaces(users: Users, user: Array, new_session: Array, rng: np.random.Generator) -> Array:
    """[N] each by the user's own shares, with a leaning to stay where one is."""
    fresh = new_session | (rng.random(user.size) >= STICKY)
    cumulative = np.cumsum(users.surface_share[user], axis=1)
    drawn = (rng.random(user.size)[:, None] * cumulative[:, -1:] > cumulative[:, :-1]).sum(axis=1)
    at = np.arange(user.size)
    return drawn[np.maximum.accumulate(np.where(fresh, at, 0))]


def _candidate_counts(config: SimulationConfig, surface: Array, rng: np.random.Generator) -> Array:
    mean = np.array([s.candidates for s in config.resolved_surfaces])
    low = np.maximum(np.round(mean * (1 - config.candidate_spread)), 1).astype(np.int64)
    high = np.maximum(2 * mean - low, low)
    return rng.integers(low[surface], high[surface] + 1)
