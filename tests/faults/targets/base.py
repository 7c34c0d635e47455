"""What a target is, and the small model that several are made of."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Damage = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True, kw_only=True)
class Target:
    """One reader.

    Args:
        name: of the target and of its folder of the corpus.
        seeds: valid texts.
        damage: makes a case of a seed.
        run: reads a case; raises a TrefoilError or holds up.
        share: of all cases.
    """

    name: str
    seeds: tuple[bytes, ...]
    damage: Damage
    run: Callable[[bytes], None]
    share: float


class WrongRow(AssertionError):
    """A reader accepted what it must not, or gave something else than it was given."""


def task_and_plan() -> Any:
    """The plan of the small model that tests train."""
    from pipeline.train.model_plan import model_plan
    from tests.data.logs import schema
    from tests.train.runs import tiny_config

    of = schema()
    moments = {f.name: (0.0, 1.0) for f in of.features if f.vocabulary is None}
    return model_plan(tiny_config(), of, moments)
