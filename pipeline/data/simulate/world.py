"""What is the same for all users: ads, advertisers, and the effects that the response is made of.

Letters: I ads, K topics, D = K + STYLES taste dimensions, S surfaces.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.data.simulate.config import SimulationConfig
from pipeline.data.simulate.schema import AGES, COUNTRIES, DEVICES, FORMATS

STYLES = 2  # hidden dimensions of ads that no feature but the ids tells
STYLE_SCALE = 0.25  # of a style dimension, where a topic's is 1
SECOND_TOPIC = 0.25  # share of ads with two topics

Array = np.ndarray


def generator(seed: int, *stream: int) -> np.random.Generator:
    """The random numbers of one named stream: a function of the seed and the stream alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, *stream))))


def mix(common: Array, own: Array, shared: float | Array) -> Array:
    """sqrt(shared) * common + sqrt(1 - shared) * own: keeps the variance, correlates surfaces by `shared`."""
    return (np.sqrt(shared) * common + np.sqrt(1 - np.asarray(shared)) * own).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class World:
    """Ads and effects. Index 0 of an ad array is ad id 1.

    Args:
        shared: [S] share of variance that a surface has in common with the others.
        topic: [I] primary topic.
        second: [I] second topic, -1 where there is none.
        vector: [I, D] topics and style of the ad, the topic part of length 1.
        advertiser: [I].
        format: [I].
        price: [I] log price, standardised; the truth knows it also where the log does not.
        price_missing: [I].
        creative_score: [I] a noisy reading of the ad's quality.
        start_day: [I] day of the log on which the ad starts; 0 and less for those of old.
        popularity: [I] relative weight.
        quality: [S, I] logits, for clicks.
        long_quality: [S, I] logits, for long clicks.
        device_format: [S, devices, formats] logits.
        price_slope: [S, ages] logits for one standard deviation of log price.
        hour: [S, 24] logits.
        trend: [days of warm-up and log, D] logits.
        transfer: [S, D, D] what acting on an ad says about each dimension of what the user wants next.
        age_taste, country_taste: [1 + S, ., D] taste of a group, common and of each surface, variance 1 together.
        age_bias, country_bias: [1 + S, .] the same for the readiness to click.
    """

    shared: Array
    topic: Array
    second: Array
    vector: Array
    advertiser: Array
    format: Array
    price: Array
    price_missing: Array
    creative_score: Array
    start_day: Array
    popularity: Array
    quality: Array
    long_quality: Array
    device_format: Array
    price_slope: Array
    hour: Array
    trend: Array
    transfer: Array
    age_taste: Array
    country_taste: Array
    age_bias: Array
    country_bias: Array

    @property
    def dimensions(self) -> int:
        return int(self.vector.shape[1])

    @property
    def carry(self) -> Array:
        """[S, S] by how much an event on one surface counts on another: by what the two have in common."""
        carry = np.sqrt(self.shared[:, None] * self.shared[None, :])
        np.fill_diagonal(carry, 1.0)
        return carry


def make_world(config: SimulationConfig) -> World:
    """The world of a configuration."""
    rng = generator(config.seed, 1)
    surfaces = len(config.surfaces)
    shared = np.array([config.sharing * (1 - s.deviation) for s in config.surfaces])
    dimensions = config.topics + STYLES

    def effect(*shape: int, scale: float) -> Array:
        """[S, *shape] of standard deviation `scale`, correlated between surfaces."""
        s = shared.reshape(-1, *([1] * len(shape)))
        return scale * mix(rng.standard_normal(shape)[None], rng.standard_normal((surfaces, *shape)), s)

    def group(count: int, *shape: int) -> Array:
        """[1 + S, count, *shape]: half the variance of what demographics explain."""
        return (rng.standard_normal((1 + surfaces, count, *shape)) * np.sqrt(0.5)).astype(np.float32)

    ads = _ads(config, rng)
    from_advertiser = effect(config.advertisers, scale=0.92 * config.quality)[:, ads["advertiser"]]
    quality = from_advertiser + effect(config.items, scale=0.4 * config.quality)
    noise = rng.standard_normal(config.items) * max(config.quality, 0.1)
    steps = rng.standard_normal((config.warmup_days + config.days, dimensions)) * config.trend
    phase = rng.uniform(0, 24, size=(1 + surfaces, 1))
    daily = np.sin((np.arange(24) - phase) * 2 * np.pi / 24) * np.sqrt(2)
    return World(
        **ads,
        shared=shared,
        creative_score=(quality.mean(axis=0) + 0.6 * noise).astype(np.float32),
        quality=quality,
        long_quality=effect(config.advertisers, scale=config.quality)[:, ads["advertiser"]],
        device_format=effect(DEVICES, FORMATS, scale=0.7 * config.context_effects),
        price_slope=effect(AGES, scale=0.7 * config.context_effects),
        hour=0.5 * config.context_effects * mix(daily[:1], daily[1:], shared[:, None]),
        trend=np.cumsum(steps, axis=0).astype(np.float32),
        transfer=_transfer(config, rng, shared),
        age_taste=group(AGES, dimensions),
        country_taste=group(COUNTRIES, dimensions),
        age_bias=group(AGES),
        country_bias=group(COUNTRIES),
    )


def _ads(config: SimulationConfig, rng: np.random.Generator) -> dict[str, Array]:
    """What an ad is, apart from how well it does."""
    items, topics = config.items, config.topics
    topic = rng.permutation(np.arange(items) % topics)
    # Advertiser a works in topic a % topics, so that ids of both kinds tell of each other.
    of_topic = (config.advertisers - 1 - topic) // topics + 1
    advertiser = topic + topics * (rng.random(items) ** 1.5 * of_topic).astype(np.int64)
    second = (topic + rng.integers(1, topics, size=items)) % topics
    second = np.where(rng.random(items) < SECOND_TOPIC, second, -1)
    vector = np.zeros((items, topics + STYLES), dtype=np.float32)
    vector[np.arange(items), topic] = np.where(second >= 0, 0.85, 1.0)
    two = np.flatnonzero(second >= 0)
    vector[two, second[two]] = np.sqrt(1 - 0.85**2)
    style = STYLE_SCALE * rng.standard_normal((config.advertisers, STYLES))
    vector[:, topics:] = style[advertiser] + 0.05 * rng.standard_normal((items, STYLES))
    popularity = (1.0 + rng.permutation(items)) ** -config.popularity_skew
    return {
        "topic": topic,
        "second": second,
        "vector": vector,
        "advertiser": advertiser,
        "format": rng.integers(0, FORMATS, size=items),
        "price": rng.standard_normal(items).astype(np.float32),
        "price_missing": rng.random(items) < config.missing,
        "start_day": _item_start(config, rng, topic),
        "popularity": popularity / popularity.sum(),
    }


def _transfer(config: SimulationConfig, rng: np.random.Generator, shared: Array) -> Array:
    """[S, D, D]: the common part says "more of the same", a surface's own part sends each topic to another."""
    dimensions = config.topics + STYLES
    result = np.empty((shared.size, dimensions, dimensions), dtype=np.float32)
    for surface, part in enumerate(shared):
        own = np.eye(dimensions)
        # A random cycle through all topics: none goes to itself.
        cycle = rng.permutation(config.topics)
        own[:, : config.topics] = 0.0
        own[cycle, np.roll(cycle, 1)] = 1.0
        result[surface] = part * np.eye(dimensions) + (1 - part) * own
    return result


def _item_start(config: SimulationConfig, rng: np.random.Generator, topic: Array) -> Array:
    """[I] first day of each ad; one ad of every topic is always there from the beginning."""
    start = -rng.integers(0, 60, size=config.items)
    new = round(config.items * config.new_items_per_day * (config.days - 1))
    _, first = np.unique(topic, return_index=True)
    others = np.setdiff1d(np.arange(config.items), first)
    late = rng.permutation(others)[:new]
    start[late] = 1 + np.arange(late.size) % max(config.days - 1, 1)
    return start - np.where(start <= 0, config.warmup_days, 0)


class Catalogue:
    """The ads of one day, to draw from by popularity, in all or within a topic."""

    def __init__(self, world: World, day: int, topics: int) -> None:
        alive = np.flatnonzero(world.start_day <= day)
        self._items = alive[np.argsort(world.topic[alive], kind="stable")]
        self._cumulative = np.cumsum(world.popularity[self._items])
        ends = np.searchsorted(world.topic[self._items], np.arange(topics + 1))
        bounds = np.concatenate([[0.0], self._cumulative])[ends]
        self._low, self._width = bounds[:-1], np.diff(bounds)
        self._first, self._last = ends[:-1], ends[1:] - 1

    def draw(self, rng: np.random.Generator, topic: Array) -> Array:
        """One ad for each entry: of that topic, or of any where the entry is -1."""
        uniform = rng.random(topic.size)
        anywhere = topic < 0
        at = np.where(anywhere, uniform * self._cumulative[-1], self._low[topic] + uniform * self._width[topic])
        position = np.searchsorted(self._cumulative, at, side="right")
        # Rounding may step over a topic's edge.
        position = np.where(anywhere, position, np.clip(position, self._first[topic], self._last[topic]))
        return self._items[np.minimum(position, self._items.size - 1)]
