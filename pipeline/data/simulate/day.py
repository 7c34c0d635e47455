"""One day of one bucket of users: requests in the order in which each user makes them.

What a user does moves what the user wants next, so the k-th requests of all users are simulated together,
then their (k + 1)-th; a day takes as many steps as the busiest user makes requests.

Letters: N requests of the day, n of a step, M candidates of the day, C of a step, T tasks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.data.simulate.config import SimulationConfig
from pipeline.data.simulate.response import Logits, respond
from pipeline.data.simulate.schema import GENERIC_TERMS, TASKS
from pipeline.data.simulate.users import Users
from pipeline.data.simulate.visits import Visits, make_visits
from pipeline.data.simulate.world import Array, Catalogue, World

SHARPNESS = 3.0  # how strongly retrieval, queries and related items follow interest
QUERY_TERMS = 3  # the most terms of a query
GENERIC_SHARE = 0.2  # of a query's terms after the first
MATCH_MEAN = 0.35
REDRAWS = 2  # rounds in which ads that stand twice in a request are drawn anew


@dataclass(frozen=True, kw_only=True)
class DayLog:
    """What happened on a day. Arrays over candidates follow the order of `visits`.

    Args:
        visits: the requests.
        query: [N, QUERY_TERMS] term ids from 0, -1 = no term.
        related: [N] ad, -1 = none.
        item: [M].
        match_score: [M] noisy reading of the query's match; meaningless without a query.
        truth, label: [M, T].
        logits: click and other logits of every candidate, kept for calibration.
    """

    visits: Visits
    query: Array
    related: Array
    item: Array
    match_score: Array
    truth: Array
    label: Array
    logits: Logits


def ragged(start: Array, length: Array) -> Array:
    """start[0], start[0] + 1, ... (length[0] of them), start[1], ...

    >>> ragged(np.array([5, 0]), np.array([2, 3])).tolist()
    [5, 6, 0, 1, 2]
    """
    ends = np.cumsum(length)
    total = int(ends[-1]) if ends.size else 0
    return np.arange(total) + np.repeat(start - (ends - length), length)


class DayEngine:
    """Simulates a day of one bucket; `run` returns its log and leaves the users' state at the day's end."""

    def __init__(
        self, config: SimulationConfig, world: World, users: Users, intercept: Array, day: int, rng: np.random.Generator
    ) -> None:
        self._config, self._world, self._users, self._intercept, self._day = config, world, users, intercept, day
        self._rng = rng
        self._catalogue = Catalogue(world, day, config.topics)
        self._is_query = np.array([s.context == "query" for s in config.surfaces])
        self._is_related = np.array([s.context == "related" for s in config.surfaces])
        self._trend = world.trend[day + config.warmup_days]

    def run(self, requests: int) -> DayLog:
        """Simulate `requests` requests."""
        self._users.start_day(self._rng)
        visits = make_visits(self._config, self._users, day=self._day, requests=requests, rng=self._rng)
        total = int(visits.candidates.sum())
        log = DayLog(
            visits=visits,
            query=np.full((requests, QUERY_TERMS), -1),
            related=np.full(requests, -1),
            item=np.zeros(total, dtype=np.int64),
            match_score=np.zeros(total, dtype=np.float32),
            truth=np.zeros((total, len(TASKS)), dtype=np.float32),
            label=np.zeros((total, len(TASKS)), dtype=np.float32),
            logits=Logits(**{name: np.zeros(total) for name in TASKS}),
        )
        order = np.argsort(visits.rank, kind="stable")
        steps = np.split(order, np.cumsum(np.bincount(visits.rank))[:-1]) if requests else []
        for rows in steps:
            self._step(log, rows)
        return log

    def _step(self, log: DayLog, rows: Array) -> None:
        visits, users, world = log.visits, self._users, self._world
        user, surface = visits.user[rows], visits.surface[rows]
        interest, long_term = users.interest(self._rng, user, surface, visits.time_ms[rows])
        chance = self._topic_chances(interest)
        context = self._context(log, rows, surface, chance)
        count = visits.candidates[rows]
        of = np.repeat(np.arange(rows.size), count)
        at = ragged(visits.offsets[rows], count)
        item = self._candidates(of, surface, chance, context)
        logits, match = self._logits(log, rows, of, item, interest, long_term, context)
        outcomes = respond(self._config, logits, self._intercept[surface[of]], self._rng)
        effect = np.add.reduceat(outcomes.effect[:, None] * world.vector[item], np.cumsum(count) - count, axis=0)
        users.reinforce(user, surface, effect)
        log.item[at], log.truth[at], log.label[at] = item, outcomes.truth, outcomes.label
        log.match_score[at] = match + 0.7 * self._rng.standard_normal(match.size)
        for name in TASKS:
            getattr(log.logits, name)[at] = getattr(logits, name)

    def _topic_chances(self, interest: Array) -> Array:
        """[n, topics] cumulative probabilities of the topics that a user is after."""
        x = SHARPNESS * (interest[:, : self._config.topics] + self._trend[: self._config.topics])
        x = np.exp(x - x.max(axis=1, keepdims=True))
        return np.cumsum(x / x.sum(axis=1, keepdims=True), axis=1)

    def _draw_topic(self, chance: Array) -> Array:
        return (self._rng.random((chance.shape[0], 1)) > chance[:, :-1]).sum(axis=1)

    def _context(self, log: DayLog, rows: Array, surface: Array, chance: Array) -> Array:
        """[n, D] what a request is about: a topic, an ad's vector, or zero. Fills in queries and related items."""
        world, rng = self._world, self._rng
        topic = self._draw_topic(chance)
        about = np.zeros((rows.size, world.dimensions), dtype=np.float32)
        asks = np.flatnonzero(self._is_query[surface])
        about[asks, topic[asks]] = 1.0
        log.query[rows[asks]] = self._terms(topic[asks])
        views = np.flatnonzero(self._is_related[surface])
        related = self._catalogue.draw(rng, topic[views])
        log.related[rows[views]] = related
        about[views] = world.vector[related]
        return about

    def _terms(self, topic: Array) -> Array:
        """[n, QUERY_TERMS] terms: the first of the topic, the others mostly; frequent ones have low numbers."""
        rng, per_topic = self._rng, self._config.terms_per_topic
        shape = (topic.size, QUERY_TERMS)
        own = topic[:, None] * per_topic + (rng.random(shape) ** 2 * per_topic).astype(np.int64)
        generic = self._config.topics * per_topic + rng.integers(0, GENERIC_TERMS, size=shape)
        terms = np.where((rng.random(shape) < GENERIC_SHARE) & (np.arange(QUERY_TERMS) > 0), generic, own)
        return np.where(np.arange(QUERY_TERMS) <= rng.integers(0, QUERY_TERMS, size=(topic.size, 1)), terms, -1)

    def _candidates(self, of: Array, surface: Array, chance: Array, context: Array) -> Array:
        """[C] ads: some for the context or the interest, some popular ones."""
        rng = self._rng
        item = self._draw_items(of, surface, chance, context)
        for _ in range(REDRAWS):
            key = of * self._world.topic.size + item
            _, first = np.unique(key, return_index=True)
            if first.size == item.size:
                break
            again = np.ones(item.size, dtype=bool)
            again[first] = False
            item[again] = self._catalogue.draw(rng, np.full(int(again.sum()), -1))
        return item

    def _draw_items(self, of: Array, surface: Array, chance: Array, context: Array) -> Array:
        wanted = self._draw_topic(chance[of])
        has_context = (self._is_query | self._is_related)[surface]
        about = np.argmax(context[:, : self._config.topics], axis=1)
        wanted = np.where(has_context[of] & (self._rng.random(of.size) < 0.75), about[of], wanted)
        retrieved = self._rng.random(of.size) < self._config.retrieval
        return self._catalogue.draw(self._rng, np.where(retrieved, wanted, -1))

    def _logits(
        self, log: DayLog, rows: Array, of: Array, item: Array, interest: Array, long_term: Array, context: Array
    ) -> tuple[Logits, Array]:
        """Logits of the candidates, and [C] their match with the context."""
        config, world, users, visits = self._config, self._world, self._users, log.visits
        user, surface = visits.user[rows][of], visits.surface[rows][of]
        vector = world.vector[item]
        match = (vector * context[of]).sum(axis=1)
        has_context = (self._is_query | self._is_related)[surface]
        strength = (
            (vector * (interest[of] + self._trend)).sum(axis=1)
            + config.relevance * np.where(has_context, match - MATCH_MEAN, 0)
        ).astype(np.float64)
        quality = world.quality[surface, item]
        hour = (visits.time_ms[rows] // 3_600_000 % 24)[of]
        age_days = self._day - world.start_day[item]
        circumstances = (
            world.device_format[surface, users.device[user], world.format[item]]
            + world.price_slope[surface, users.age[user]] * world.price[item]
            + world.hour[surface, hour]
            - 0.3 * config.context_effects * np.log1p(age_days)
        )
        taste = (vector * long_term[of]).sum(axis=1)
        logits = Logits(
            click=users.bias[user, surface] + quality + strength + circumstances,
            long_click=0.7 * strength + world.long_quality[surface, item],
            save=0.7 * taste + 0.5 * strength + 0.5 * quality,
            hide=-0.8 * strength - quality,
        )
        return logits, match
