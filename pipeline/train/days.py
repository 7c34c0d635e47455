"""Which days are trained on, validated on and tested on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.config import DaysConfig
from pipeline.data.logs import Dataset
from pipeline.errors import ConfigError, DataError, unknown


@dataclass(frozen=True, kw_only=True)
class DaySplit:
    """Days in order of time: training days, then validation days, then test days."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """One day of continuous training.

    Args:
        day: the day to train on.
        first_epoch: passes over earlier days.
        moments: of numeric features, as the first day fixed them; None on the first day.
        days_done: digest of each day that was trained on before.
    """

    day: str
    first_epoch: int
    moments: Mapping[str, tuple[float, float]] | None
    days_done: Mapping[str, str]

    @property
    def split(self) -> DaySplit:
        """Training on this day alone."""
        return DaySplit(train=(self.day,), validation=(), test=())


def split_days(dataset: Dataset, config: DaysConfig) -> DaySplit:
    """Split a log by time, never at random.

    Raises:
        DataError: `first` or `last` is not a day of the log.
        ConfigError: no day is left to train on.
    """
    for day in (config.first, config.last):
        if day is not None and day not in dataset.days:
            raise DataError(unknown("day", day, dataset.days), file=str(dataset.root))
    days = tuple(
        d
        for d in dataset.days
        if (config.first is None or d >= config.first) and (config.last is None or d <= config.last)
    )
    held = config.validation + config.test
    if len(days) <= held:
        raise ConfigError(
            f"{len(days)} days are chosen and days.validation + days.test hold out {held}: none is left to train on; "
            "lower these or widen days.first and days.last"
        )
    cut = len(days) - config.test
    return DaySplit(
        train=days[: cut - config.validation], validation=days[cut - config.validation : cut], test=days[cut:]
    )
