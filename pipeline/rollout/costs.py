"""Which surfaces cost alike, and so in which order they join the unified model. Pure functions of measured costs.

Cost is what serving one request takes, measured on the surface's own mean number of candidates and history events:
`CostProfile.ms`. Neither names, nor traffic, nor revenue enter: a surface that brings much may wait, one that costs
little may go first. Costs c of a group match when max(c) <= within * min(c), so that one budget fits them all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.errors import ConfigError

MEASURE = (
    "milliseconds of processor time of one thread to score one request, median over runs, in batches of requests "
    "that all have the surface's mean numbers of candidates and history events; all models timed in turn"
)


@dataclass(frozen=True, kw_only=True)
class CostProfile:
    """What one model costs on one surface.

    Args:
        candidates: of each request.
        history: events of each request.
        requests: in a batch.
        ms: milliseconds a request, median over runs.
        p99_ms: 99th percentile of the milliseconds of a whole batch.

    Raises:
        ConfigError: a cost is not a positive number.
    """

    candidates: int
    history: int
    requests: int
    ms: float
    p99_ms: float

    def __post_init__(self) -> None:
        for name in ("ms", "p99_ms"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"a cost profile's {name} is {value}; it must be a positive number")

    @property
    def requests_per_second(self) -> float:
        """Throughput of one thread."""
        return 1000 / self.ms


@dataclass(frozen=True, kw_only=True)
class Staging:
    """The waves that costs ask for.

    Args:
        groups: surfaces of matched cost, cheapest group first; within a group in the order they were given.
        waves: the surfaces of the unified model after each wave; each holds all surfaces of the wave before it.
        reasons: why each wave is what it is, one sentence a wave.
        pointless: why there is nothing to stage; empty if staging is worth it.
    """

    groups: tuple[tuple[str, ...], ...]
    waves: tuple[tuple[str, ...], ...]
    reasons: tuple[str, ...]
    pointless: str


def group_by_cost(costs: Mapping[str, float], within: float) -> tuple[tuple[str, ...], ...]:
    """Surfaces of matched cost, cheapest first: each group takes what costs at most `within` times its cheapest.

    >>> group_by_cost({"hf": 1.0, "rp": 3.0, "sr": 1.2}, within=1.5)
    (('hf', 'sr'), ('rp',))

    Raises:
        ConfigError: `within` is below 1, or a cost is not a positive number.
    """
    if not within >= 1:
        raise ConfigError(f"matched_within is {within}; it is a ratio of costs and must be at least 1, such as 1.5")
    for surface, cost in costs.items():
        if not (math.isfinite(cost) and cost > 0):
            raise ConfigError(f"the cost of surface {surface!r} is {cost}; it must be a positive number")
    groups: list[list[str]] = []
    cheapest = 0.0
    for cost in sorted(costs.values()):
        if not groups or cost > within * cheapest:
            groups.append([])
            cheapest = cost
        groups[-1] += [s for s, c in costs.items() if c == cost and s not in groups[-1]]
    return tuple(tuple(s for s in costs if s in group) for group in groups)


def stage(costs: Mapping[str, float], *, within: float) -> Staging:
    """Waves from cheap to expensive.

    The first wave takes the cheapest groups until it has two surfaces, for one surface alone unifies nothing; every
    later wave adds one group.

    Args:
        costs: milliseconds a request of each surface's separate model.
        within: greatest ratio of costs that still match.

    Raises:
        ConfigError: there is no surface, or a number is out of range.
    """
    if not costs:
        raise ConfigError("there is no cost profile; profile the separate model of each surface first")
    groups = group_by_cost(costs, within)
    pointless = _pointless(costs, groups, within)
    if pointless:
        return Staging(groups=groups, waves=(tuple(costs),), reasons=(pointless,), pointless=pointless)
    waves: list[tuple[str, ...]] = []
    reasons: list[str] = []
    taken: list[str] = []
    joined: list[tuple[str, ...]] = []
    for group in groups:
        taken += group
        joined.append(group)
        if len(taken) < 2:
            continue
        waves.append(tuple(s for s in costs if s in taken))
        reasons.append(_reason(joined, waves, costs, within))
        joined = []
    return Staging(groups=groups, waves=tuple(waves), reasons=tuple(reasons), pointless="")


def _pointless(costs: Mapping[str, float], groups: Sequence[tuple[str, ...]], within: float) -> str:
    if len(costs) == 1:
        return f"there is one surface only, {next(iter(costs))}: nothing to unify and nothing to stage"
    if len(costs) == 2:
        return "staging is pointless: two surfaces make one wave, whatever they cost"
    if len(groups) == 1:
        ratio = max(costs.values()) / min(costs.values())
        return (
            f"staging is pointless: all costs match, the dearest is {ratio:.2f} times the cheapest and {within:g} is "
            "allowed; one wave takes them all"
        )
    if len(groups) == 2 and len(groups[0]) == 1:
        return (
            f"staging is pointless: the cheapest surface, {groups[0][0]}, matches no other, and all others match one "
            "another; a first wave of two would split them"
        )
    return ""


def _reason(
    joined: Sequence[tuple[str, ...]], waves: Sequence[tuple[str, ...]], costs: Mapping[str, float], within: float
) -> str:
    new = [s for group in joined for s in group]
    names = " and ".join(", ".join(f"{s} ({costs[s]:.3g} ms)" for s in new).rsplit(", ", 1))
    ratio = max(costs[s] for s in new) / min(costs[s] for s in new)
    if len(waves) == 1 and len(joined) == 1:
        return f"{names} are the cheapest and match: {ratio:.2f} is at most {within:g}"
    if len(waves) == 1:
        return f"{names} are the cheapest; no two surfaces match before them, yet one alone unifies nothing"
    before = min(costs[s] for s in waves[-2])
    dearest = max(costs[s] for s in new)
    verb = "joins" if len(new) == 1 else "join"
    return f"{names} {verb}: {dearest / before:.2f} times the cheapest of wave {len(waves) - 1}, past {within:g}"


def predict(
    waves: Sequence[Sequence[str]],
    separate: Mapping[str, CostProfile],
    unified: Mapping[str, CostProfile],
) -> tuple[dict[str, float], ...]:
    """Milliseconds a request of every surface after each wave.

    A surface costs what its separate model does until its wave, and from then on what the unified model costs on it.

    Args:
        waves: surfaces of the unified model after each wave.
        separate: profile of each surface's separate model.
        unified: profile of the unified model, pruned to each surface.

    Raises:
        ConfigError: a surface of a wave has no profile, or its two profiles are of different shapes.
    """
    for surface in {s for wave in waves for s in wave}:
        if surface not in separate or surface not in unified:
            which = "separate" if surface not in separate else "unified"
            raise ConfigError(f"the {which} model has no cost profile on surface {surface!r}; measure it first")
        one, other = separate[surface], unified[surface]
        if (one.candidates, one.history, one.requests) != (other.candidates, other.history, other.requests):
            raise ConfigError(
                f"the profiles of surface {surface!r} are of different shapes ({one.requests} requests x "
                f"{one.candidates} candidates x {one.history} events, and {other.requests} x {other.candidates} x "
                f"{other.history}); measure both on the same"
            )
    return tuple({s: (unified if s in wave else separate)[s].ms for s in separate} for wave in waves)
