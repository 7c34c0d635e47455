"""Which days of a log are read, and how batches are made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import with_config

from pipeline.config.strict import STRICT

Exhaustion = Literal["stop", "repeat", "drop_out"]


@with_config(STRICT)
@dataclass(frozen=True, kw_only=True)
class DaysConfig:
    """Which days of the log are trained on, validated on and tested on; always in this order of time."""

    first: str | None = None
    """First day to use, such as 2022-04-25; none given is the log's first."""
    last: str | None = None
    """Last day to use; none given is the log's last."""
    validation: int = 1
    """Days before the test days that are held out for choosing."""
    test: int = 1
    """Last days, scored once at the end."""


@with_config(STRICT)
@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How batches are made from a log."""

    requests_per_batch: int = 512
    """Requests of one global batch, over all ranks."""
    surface_weights: dict[str, float] | None = None
    """Share of each surface in a batch; none given is the natural share."""
    temperature: float | None = None
    """Shares by size ** (1 / temperature), in place of surface_weights."""
    exhaustion: Exhaustion = "drop_out"
    """What happens when a surface runs out first: stop, repeat or drop_out."""
    history_length: int | None = None
    """Keep at most this many of the newest events of a history; none given keeps what the log has."""
    shuffle: bool = True
    """Shuffle requests within a surface; without it they come in the order of the files."""
    lanes: int = 32
    """Independent pieces of a surface's epoch: the most ranks that can read it. Part of the order of data."""
    window: int = 512
    """Requests of a lane that are shuffled and held in memory together. Part of the order of data."""
    prefetch_batches: int = 4
    """Batches made ahead of the step that needs them; 0 makes them in the caller's thread."""
    bad_input: Literal["raise", "quarantine"] = "raise"
    """Stop at the first row group that is damaged or holds what it must not, or leave such row groups out,
    counted and reported; steps stay as they are, with fewer requests."""
    max_candidates: int | None = None
    """The most candidates of one request row in a batch; none given sets no bound."""
    past_max_candidates: Literal["split", "cap"] = "split"
    """A request with more becomes several rows of the same batch, or loses the candidates past the bound, counted."""
