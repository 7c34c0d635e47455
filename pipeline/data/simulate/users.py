"""A bucket of users: who they are, what they like, and the short-term state that moves with each request.

Letters: U users of the bucket, S surfaces, D taste dimensions, N requests of a step, C their candidates.
"""

from __future__ import annotations

import numpy as np

from pipeline.data.simulate.config import DAY_MS, SimulationConfig
from pipeline.data.simulate.schema import AGES, COUNTRIES, DEVICES
from pipeline.data.simulate.world import Array, World, generator, mix

HOUR_MS = 3_600_000
NEVER = np.iinfo(np.int64).min // 4  # time of the last request of who has not yet made one


def relative(interest: Array, topics: int) -> Array:
    """Interest [N, D], changed in place to a mean of 0 over topics: what one topic gains, the others lose. Without
    this whoever clicks much would come to click everything."""
    interest[:, :topics] -= interest[:, :topics].mean(axis=1, keepdims=True)
    return interest


class Users:
    """State of one bucket, carried from day to day.

    Attributes:
        ids: [U] user ids, from 1.
        join_day: [U] day of the log on which the user comes; negative for those of old.
        activity: [U] relative number of requests.
        surface_share: [U, S] share of the user's requests on each surface.
        age, country, device: [U]. `age_missing`: [U] whether the log knows the age.
        bias: [U, S] readiness to click, logits.
        taste: [U, S, D] long-term taste, variance 1.
        last_ms: [U] time of the latest request, `NEVER` before the first.
    """

    def __init__(self, config: SimulationConfig, world: World, *, first: int, count: int, stream: tuple[int, ...]):
        rng = generator(config.seed, *stream)
        surfaces, dimensions = len(config.surfaces), world.dimensions
        self._config = config
        self._world = world
        self.ids = first + np.arange(count, dtype=np.int64)
        self.join_day = self._join_day(rng, count)
        self.activity = 0.15 + rng.gamma(0.8, size=count)
        volume = np.array([s.volume for s in config.surfaces])
        preference = rng.gamma(4.0 * volume / volume.sum(), size=(count, surfaces)) + 1e-9
        self.surface_share = preference / preference.sum(axis=1, keepdims=True)
        self.age = rng.integers(0, AGES, size=count)
        self.age_missing = rng.random(count) < config.missing
        self.country = np.minimum(rng.geometric(0.25, size=count) - 1, COUNTRIES - 1)
        self.device = rng.choice(DEVICES, size=count, p=[0.55, 0.3, 0.15])
        own_bias = rng.standard_normal((count, 1 + surfaces)).astype(np.float32)
        self.bias = config.user_bias * self._with_group(own_bias, world.age_bias, world.country_bias)
        self._own = rng.standard_normal((count, 1 + surfaces, dimensions)).astype(np.float32)
        self._refresh_taste()
        self._intent = rng.standard_normal((count, 1 + surfaces, dimensions)).astype(np.float32)
        self._reinforced = np.zeros((count, surfaces, dimensions), dtype=np.float32)
        self.last_ms = np.full(count, NEVER)

    def _join_day(self, rng: np.random.Generator, count: int) -> Array:
        """[U]: a share joins on each day after the first, spread evenly, the rest was there before."""
        config = self._config
        new = min(round(count * config.new_users_per_day * (config.days - 1)), count - 1)
        join = -config.warmup_days - rng.integers(0, 700, size=count)
        late = rng.permutation(count)[:new]
        join[late] = 1 + (np.arange(new) + rng.integers(config.days)) % max(config.days - 1, 1)
        return join

    def _with_group(self, own: Array, by_age: Array, by_country: Array) -> Array:
        """Own part [U, 1 + S, ...] and demographics to [U, S, ...], variance 1."""
        group = np.moveaxis(by_age[:, self.age] + by_country[:, self.country], 0, 1)
        whole = mix(group, own, self._config.demographic_share)
        shared = self._world.shared.reshape(1, -1, *([1] * (whole.ndim - 2)))
        return mix(whole[:, :1], whole[:, 1:], shared)

    def _refresh_taste(self) -> None:
        self.taste = self._with_group(self._own, self._world.age_taste, self._world.country_taste)

    def start_day(self, rng: np.random.Generator) -> None:
        """Let tastes drift overnight."""
        fresh = rng.standard_normal(self._own.shape, dtype=np.float32)
        self._own = mix(fresh, self._own, self._config.drift)
        self._refresh_taste()

    def alive(self, day: int) -> Array:
        """[U] whether the user has joined by that day."""
        return self.join_day <= day

    def tenure_days(self, user: Array, time_ms: Array) -> Array:
        """Days from joining to the request."""
        joined = self._config.start_ms + self.join_day[user] * DAY_MS
        return ((time_ms - joined) / DAY_MS).astype(np.float32)

    def interest(self, rng: np.random.Generator, user: Array, surface: Array, time_ms: Array) -> tuple[Array, Array]:
        """Move the users' short-term state to now and read it.

        Returns:
            [N, D] whole interest in logits (long-term and short-term), and [N, D] its long-term part.
        """
        config = self._config
        gap_hours = (np.minimum(time_ms - self.last_ms[user], 10_000 * HOUR_MS) / HOUR_MS).astype(np.float32)
        kept = np.exp(-gap_hours / np.float32(config.intent_hours))[:, None, None]
        fresh = rng.standard_normal((user.size, *self._intent.shape[1:]), dtype=np.float32)
        self._intent[user] = kept * self._intent[user] + np.sqrt(1 - kept * kept) * fresh
        self._reinforced[user] *= np.exp(-gap_hours / np.float32(config.reinforcement_hours))[:, None, None]
        self.last_ms[user] = time_ms
        shared = self._world.shared[surface][:, None]
        intent = mix(self._intent[user, 0], self._intent[user, 1 + surface], shared)
        long_term = config.taste * self.taste[user, surface]
        short_term = config.intent * intent + config.reinforcement * np.tanh(self._reinforced[user, surface])
        return relative(long_term + short_term, config.topics), relative(long_term, config.topics)

    def reinforce(self, user: Array, surface: Array, effect: Array) -> None:
        """Add what was done in a request to the state.

        Args:
            user, surface: [N], each user once.
            effect: [N, D] sum over candidates of the actions' weights times ad vectors.
        """
        carry = self._world.carry[surface]
        # Without optimize, einsum stays clear of BLAS, whose sums may depend on the number of threads.
        wanted = np.einsum("nd,sde->nse", effect, self._world.transfer, optimize=False)
        self._reinforced[user] += (carry[:, :, None] * wanted).astype(np.float32)
