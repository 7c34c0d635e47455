"""Which days are trained on, validated on and tested on; and, day after day, which day comes next."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import date, timedelta

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
        digest: of that day, see `day_digest`.
        first_epoch: passes over earlier days.
        moments: of numeric features, as the first day fixed them; None on the first day.
        days_done: digest of each day that was trained on before.
    """

    day: str
    digest: str
    first_epoch: int
    moments: Mapping[str, tuple[float, float]] | None
    days_done: Mapping[str, str]

    @property
    def split(self) -> DaySplit:
        """Training on this day alone."""
        return DaySplit(train=(self.day,), validation=(), test=())


@dataclass(frozen=True, kw_only=True)
class DayChoices:
    """What to do about days that are not as a calendar wants them; each is named, none is guessed.

    Args:
        skip: days that are missing, or not to be trained on.
        late: days that came after a later one was trained on, to be trained on now, out of order.
        again: days whose files have changed since they were trained on, to be trained on once more.
        keep: days whose files have changed since, to be left as they were learned.
    """

    skip: tuple[str, ...] = ()
    late: tuple[str, ...] = ()
    again: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()


def day_digest(dataset: Dataset, day: str) -> str:
    """What a day holds, as the log's description says: files, sizes, rows. Other days do not change it."""
    parts = [asdict(p) for p in dataset.description.partitions if p.date == day]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def days_to_come(dataset: Dataset, config: DaysConfig, done: Mapping[str, str], choices: DayChoices) -> tuple[str, ...]:
    """The days to train on next: late and changed ones that are named, then the new ones, each in order of time.

    Args:
        dataset: the log as it is now.
        config: its first and last day bound what is looked at.
        done: digest of each day that was trained on.
        choices: what to do about days that are missing, late or changed.

    Raises:
        DataError: a day is missing between others, came late, or has changed, and no choice names it; or a choice
            names what is not so.
    """
    days = tuple(
        d
        for d in dataset.days
        if (config.first is None or d >= config.first) and (config.last is None or d <= config.last)
    )
    changed = {d for d in days if d in done and done[d] != day_digest(dataset, d)}
    last_done = max(done, default="")
    fresh = [d for d in days if d not in done and d not in choices.skip]
    late = {d for d in fresh if d < last_done}
    new = [d for d in fresh if d > last_done]
    problems = [f"{d} came after {last_done} was trained on: --late or --skip {d}" for d in sorted(late)]
    problems = [p for p in problems if p[:10] not in choices.late]
    problems += [
        f"{d} has changed since it was trained on: --again or --keep {d}"
        for d in sorted(changed)
        if d not in choices.again and d not in choices.keep
    ]
    problems += [
        f"{d} is missing: write it, or --skip {d}"
        for d in _gaps(last_done, new)
        if d not in choices.skip and d not in days
    ]
    problems += [f"--late {d}: it is not late" for d in choices.late if d not in late]
    problems += [f"--again {d}: it has not changed" for d in choices.again if d not in changed]
    problems += [f"{d} is named by both --again and --keep" for d in choices.again if d in choices.keep]
    if problems:
        raise DataError("the days are not as they should be:\n  - " + "\n  - ".join(problems), file=str(dataset.root))
    return (*sorted((late & set(choices.late)) | (changed & set(choices.again))), *new)


def _gaps(last_done: str, new: list[str]) -> list[str]:
    """Calendar days between the last day done, or the first new one, and the last new one that are not new."""
    if not new:
        return []
    day, end = date.fromisoformat(last_done or new[0]) + timedelta(days=1), date.fromisoformat(new[-1])
    found = []
    while day < end:
        if day.isoformat() not in new:
            found.append(day.isoformat())
        day += timedelta(days=1)
    return found


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
