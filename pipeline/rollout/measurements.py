"""What the gates look at: measurements of one challenger on one surface, and their form as JSON.

Everything may be None, which means that it was not measured; a gate that lacks its measurement fails.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pydantic import ConfigDict, TypeAdapter, with_config

_STRICT = ConfigDict(extra="forbid", ser_json_inf_nan="constants")


@with_config(_STRICT)
@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value and the interval that users' luck leaves it; None where undefined."""

    value: float | None
    low: float | None
    high: float | None


@with_config(_STRICT)
@dataclass(frozen=True, kw_only=True)
class Slice:
    """Calibration (sum of probabilities over sum of labels) of a part of the rows.

    Args:
        positives: rows of the slice whose outcome was positive.
        rows: of the slice.
        calibration: None where the slice has no positive.
    """

    positives: int
    rows: int
    calibration: Interval | None


@with_config(_STRICT)
@dataclass(frozen=True, kw_only=True)
class TaskMeasurements:
    """How a challenger does on one task.

    Args:
        auc, ne: its own.
        auc_difference, ne_difference: challenger less champion, paired, over resamples of users.
        calibration: overall.
        slices: kind of slice (score decile, new users, new ads, day) -> name -> slice.
    """

    auc: Interval | None = None
    ne: Interval | None = None
    auc_difference: Interval | None = None
    ne_difference: Interval | None = None
    calibration: Interval | None = None
    slices: dict[str, dict[str, Slice]] | None = None


@with_config(_STRICT)
@dataclass(frozen=True, kw_only=True)
class CostMeasurements:
    """What a challenger costs to serve on the surface's own shape; all models are timed in turn, in one process.

    Args:
        ms: a request, median over rounds.
        p99_ms: a batch.
        requests_per_second: of one thread.
        over_separate: its cost over that of the surface's separate model; median over rounds of the ratio.
        over_champion: the same over the champion's.
        ms_interval, over_separate_interval: ends of the medians' 95 % intervals over rounds, by order statistics: how
            well this machine tells, not how other machines would do.
    """

    ms: float | None = None
    p99_ms: float | None = None
    requests_per_second: float | None = None
    over_separate: float | None = None
    over_champion: float | None = None
    ms_interval: tuple[float, float] | None = None
    over_separate_interval: tuple[float, float] | None = None


@with_config(_STRICT)
@dataclass(frozen=True, kw_only=True)
class FeatureMeasurements:
    """One feature on training and on evaluation days.

    Args:
        coverage_training, coverage_evaluation: share of requests (or candidates) where it is present.
        drift: population stability index between the two.
    """

    coverage_training: float | None
    coverage_evaluation: float | None
    drift: float | None


@with_config(_STRICT)
@dataclass(frozen=True, kw_only=True)
class SurfaceMeasurements:
    """All of one challenger on one surface.

    Args:
        surface: which.
        tasks: by task.
        cost: of serving.
        parity: largest of the differences to the trainer, each over what is allowed; at most 1 is right.
        unique_users: that one run of the program takes.
        features: by name, every feature that the artifact reads.
    """

    surface: str
    tasks: dict[str, TaskMeasurements]
    cost: CostMeasurements = field(default_factory=CostMeasurements)
    parity: float | None = None
    unique_users: int | None = None
    features: dict[str, FeatureMeasurements] | None = None


MEASUREMENTS = TypeAdapter(SurfaceMeasurements)
