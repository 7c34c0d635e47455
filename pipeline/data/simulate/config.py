"""The simulator's knobs. Every one is a documented field; all problems of bad values are raised together."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from datetime import UTC, date, datetime
from typing import Any, Literal

from pipeline.errors import ConfigError

DAY_MS = 86_400_000


@dataclass(frozen=True, kw_only=True)
class SurfaceKnobs:
    """One surface: how much of it there is and how it differs from the others."""

    name: str
    """Name of the surface, as it stands in the log."""
    volume: float
    """Relative number of requests; shares are volumes over their sum."""
    candidates: int
    """Mean number of candidates of a request."""
    history: int
    """The most history events that a request of this surface carries."""
    click_rate: float
    """Mean click probability that the surface's intercept is calibrated to, in (0, 1)."""
    deviation: float = 0.0
    """How much more than the others the surface goes its own way, in [0, 1]: its shared part of the
    variance is `sharing * (1 - deviation)`."""
    context: Literal["none", "query", "related"] = "none"
    """What the request is about: nothing, a `query`, or a `related_item`."""


DEFAULT_SURFACES = (
    SurfaceKnobs(name="hf", volume=0.62, candidates=4, history=48, click_rate=0.15),
    SurfaceKnobs(name="sr", volume=0.27, candidates=5, history=40, click_rate=0.2, deviation=0.15, context="query"),
    SurfaceKnobs(name="rp", volume=0.11, candidates=10, history=64, click_rate=0.1, deviation=0.1, context="related"),
)


@dataclass(frozen=True, kw_only=True)
class SimulationConfig:
    """What to simulate. The defaults make the demo: 30 000 requests, some 150 000 impressions, 7 days.

    Raises:
        ConfigError: values that cannot work; the message lists them all.
    """

    requests: int = 30_000
    """Requests in the log, all surfaces and days together; met exactly."""
    days: int = 7
    """Days in the log."""
    users: int = 2_000
    """Users that ever appear, those who join later included."""
    items: int = 1_200
    """Ads that ever appear, those that start later included."""
    advertisers: int = 120
    """Advertisers; each ad belongs to one."""
    seed: int = 0
    """Same configuration and seed, same bytes."""
    candidates: int | None = None
    """Candidates of a request on every surface, in place of the surfaces' own numbers."""
    history: int | None = None
    """The most history events on every surface, in place of the surfaces' own numbers; 0 = no history."""
    candidate_spread: float = 0.25
    """Numbers of candidates are uniform in mean * (1 -+ spread); 0 makes them all equal."""
    surfaces: tuple[SurfaceKnobs, ...] = DEFAULT_SURFACES
    """The surfaces, in canonical order."""
    start_date: str = "2026-01-05"
    """First day of the log, ISO, UTC."""
    warmup_days: int = 3
    """Days simulated before the first day of the log, not written: they fill the histories."""
    label_delay_s: float = 60.0
    """Seconds until an outcome is known; histories hold only events older than this."""

    sharing: float = 0.85
    """Share of the variance of tastes, intents and effects that surfaces have in common, in [0, 1].
    0 = nothing shared, 1 = surfaces differ in rates and context alone."""
    taste: float = 0.6
    """Scale (logits) of users' long-term taste over topics and styles."""
    demographic_share: float = 0.8
    """Share of the variance of taste and of user bias that age and country explain."""
    drift: float = 0.02
    """Share of the variance of a user's own taste that is renewed each day."""
    trend: float = 0.03
    """Daily step (logits) of the random walk of every topic's general appeal."""
    intent: float = 0.08
    """Scale (logits) of the passing, latent intent that wanders within and between sessions."""
    intent_hours: float = 6.0
    """Hours after which an intent has faded to 1/e."""
    reinforcement: float = 2.0
    """Scale (logits) of what a user's recent actions add to or take from the interest in such ads."""
    reinforcement_hours: float = 12.0
    """Hours after which the effect of an action has faded to 1/e."""
    relevance: float = 1.5
    """Scale (logits) of the match between query or related item and candidate."""
    quality: float = 0.45
    """Scale (logits) of the ads' quality, of which advertisers make up most."""
    user_bias: float = 0.2
    """Scale (logits) of users' general readiness to click."""
    context_effects: float = 0.3
    """Scale (logits) of price, device x format, hour and ad age."""
    retrieval: float = 0.6
    """Share of candidates chosen for the user's interest or the request's context; the rest by popularity."""
    popularity_skew: float = 0.8
    """Zipf exponent of the ads' popularity; 0 = all alike."""
    topics: int = 8
    """Topics that ads and tastes are made of."""
    terms_per_topic: int = 40
    """Query terms of each topic."""
    label_noise: float = 0.0
    """Probability that a logged outcome is flipped, in [0, 0.5); the truth includes it."""
    long_click_rate: float = 0.4
    """Mean probability of a long click, given a click."""
    save_rate: float = 0.05
    """Mean probability of a save."""
    hide_rate: float = 0.03
    """Mean probability of a hide."""
    new_users_per_day: float = 0.02
    """Share of `users` that joins on each day after the first."""
    new_items_per_day: float = 0.03
    """Share of `items` that starts on each day after the first."""
    missing: float = 0.1
    """Share of values of `age_bucket` (by user) and `price` (by ad) that are absent."""

    bucket_mb: int = 64
    """Rough size in MB of one bucket of users, about half of what the process takes; smaller makes more and
    smaller files."""
    row_group_requests: int = 2048
    """Requests in a row group of the files."""

    def __post_init__(self) -> None:
        problems = [*_surface_problems(self.surfaces), *_range_problems(self)]
        if not problems:
            problems = _cross_problems(self)
        if problems:
            raise ConfigError("the simulation cannot run:\n  - " + "\n  - ".join(problems))

    @classmethod
    def tiny(cls, **overrides: Any) -> SimulationConfig:
        """A log of 300 requests on 3 days for tests; made in well under a second.

        Raises:
            ConfigError: an override is no knob, or its value cannot work.
        """
        known = {f.name for f in fields(cls)}
        if wrong := sorted(set(overrides) - known):
            raise ConfigError(f"no such knob: {', '.join(wrong)}. Known: {', '.join(sorted(known))}")
        small: dict[str, Any] = {
            "requests": 300,
            "days": 3,
            "users": 60,
            "items": 80,
            "advertisers": 16,
            "warmup_days": 1,
            "new_users_per_day": 0.05,
            "new_items_per_day": 0.05,
        }
        return cls(**{**small, **overrides})

    @property
    def resolved_surfaces(self) -> tuple[SurfaceKnobs, ...]:
        """The surfaces with `candidates` and `history` applied."""
        return tuple(
            replace(
                s,
                candidates=s.candidates if self.candidates is None else self.candidates,
                history=s.history if self.history is None else self.history,
            )
            for s in self.surfaces
        )

    @property
    def history_length(self) -> int:
        """The most history events on any surface."""
        return max(s.history for s in self.resolved_surfaces)

    @property
    def label_delay_ms(self) -> int:
        return round(self.label_delay_s * 1000)

    @property
    def start_ms(self) -> int:
        """First millisecond of the first day of the log."""
        day = date.fromisoformat(self.start_date)
        return round(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp() * 1000)

    @property
    def buckets(self) -> int:
        """Number of buckets into which users are divided: as many as keep one within `bucket_mb`."""
        surfaces, total = self.resolved_surfaces, sum(s.volume for s in self.surfaces)
        mean_candidates = sum(s.candidates * s.volume for s in surfaces) / total
        mean_history = sum(s.history * s.volume for s in surfaces) / total
        request_bytes = 300 + 250 * mean_candidates + 60 * mean_history
        user_bytes = 150 * len(surfaces) * 3 + 60 * self.history_length
        whole = self.users * user_bytes + self.requests / self.days * request_bytes
        return max(1, min(self.users, math.ceil(whole / (self.bucket_mb * 2**20))))


# Inclusive bounds of every number; a tuple of name, lowest, highest.
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("requests", 1, 10**10),
    ("days", 1, 3650),
    ("users", 1, 2**31 - 2),
    ("items", 1, 2**31 - 2),
    ("advertisers", 1, 2**31 - 2),
    ("seed", 0, 2**63 - 1),
    ("candidates", 1, 10_000),
    ("history", 0, 10_000),
    ("candidate_spread", 0, 1),
    ("warmup_days", 0, 365),
    ("label_delay_s", 0, 30 * 86_400),
    *((name, 0, 1) for name in ("sharing", "demographic_share", "drift", "retrieval", "missing")),
    *((n, 0, 10) for n in ("taste", "trend", "intent", "reinforcement", "relevance", "quality", "user_bias")),
    ("context_effects", 0, 10),
    ("intent_hours", 0.01, 10_000),
    ("reinforcement_hours", 0.01, 10_000),
    ("popularity_skew", 0, 5),
    ("topics", 2, 1000),
    ("terms_per_topic", 1, 10**6),
    ("label_noise", 0, 0.499),
    ("long_click_rate", 0.001, 0.999),
    ("save_rate", 0.0001, 0.5),
    ("hide_rate", 0.0001, 0.5),
    ("new_users_per_day", 0, 1),
    ("new_items_per_day", 0, 1),
    ("bucket_mb", 1, 10**6),
    ("row_group_requests", 1, 10**7),
)
_SURFACE_RANGES: tuple[tuple[str, float, float], ...] = (
    ("volume", 1e-9, 1e9),
    ("candidates", 1, 10_000),
    ("history", 0, 10_000),
    ("click_rate", 0.001, 0.9),
    ("deviation", 0, 1),
)
_INTEGERS = frozenset(f.name for f in fields(SimulationConfig) if str(f.type).startswith("int"))


def _out_of_range(owner: object, ranges: tuple[tuple[str, float, float], ...], prefix: str = "") -> list[str]:
    problems = []
    for name, low, high in ranges:
        value = getattr(owner, name)
        if value is None and name in ("candidates", "history") and not prefix:
            continue
        whole = name in _INTEGERS
        right = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not right:
            problems.append(f"{prefix}{name} is {value!r}; it must be {'an integer' if whole else 'a number'}")
        elif not low <= value <= high:
            problems.append(f"{prefix}{name} is {value!r}; it must lie in [{low:g}, {high:g}]")
    return problems


def _range_problems(config: SimulationConfig) -> list[str]:
    problems = _out_of_range(config, _RANGES)
    try:
        date.fromisoformat(config.start_date)
    except (TypeError, ValueError):
        problems.append(f"start_date is {config.start_date!r}; it must be an ISO day such as '2026-01-05'")
    return problems


def _surface_problems(surfaces: tuple[SurfaceKnobs, ...]) -> list[str]:
    if not surfaces:
        return ["surfaces is empty; name at least one"]
    problems = []
    names = [s.name for s in surfaces]
    for name in sorted({n for n in names if names.count(n) > 1}):
        problems.append(f"surface {name!r} is there more than once")
    for s in surfaces:
        problems += _out_of_range(s, _SURFACE_RANGES, prefix=f"surface {s.name!r}: ")
        if not s.name.isidentifier():
            problems.append(f"surface {s.name!r}: its name must be letters, digits and underscores")
        if s.context not in ("none", "query", "related"):
            problems.append(f"surface {s.name!r}: context is {s.context!r}; it must be none, query or related")
    if len(surfaces) > 100:
        problems.append(f"{len(surfaces)} surfaces are too many; 100 at most")
    return problems


def _cross_problems(config: SimulationConfig) -> list[str]:
    """Problems that only show when knobs are looked at together."""
    problems = []
    later = config.days - 1
    for name, total in (("users", config.users), ("items", config.items)):
        share = getattr(config, f"new_{name}_per_day")
        least = config.topics if name == "items" else 1
        if total - round(total * share * later) < least:
            problems.append(
                f"new_{name}_per_day is {share} over {later} days: of {total} {name} fewer than {least} are left for "
                f"the first day; lower it or raise {name}"
            )
    if config.advertisers < config.topics:
        problems.append(f"advertisers is {config.advertisers}; it must be at least topics, {config.topics}")
    return problems
