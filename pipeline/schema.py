"""What a log holds: surfaces, tasks, id spaces and features.

A `DatasetSchema` is the agreement between whoever writes logs (ingest, simulate) and whoever reads
them (loader, model, export). It knows nothing of files; `pipeline.data.logs` stores it.

Words: a *request* is one user in one context with a list of *candidates*; a *surface* is the product
place (view type) that the request came from; a *vocabulary* is an id space, and features that share a
vocabulary share one embedding table.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from pydantic import ConfigDict, with_config

from pipeline.errors import SchemaError, unknown

# Columns that every log has beside its features and tasks.
REQUEST_ID = "request_id"  # int64, unique within a surface
USER_ID = "user_id"  # int64, the raw user, for histories and for resampling by user
TIMESTAMP_MS = "timestamp_ms"  # int64, milliseconds since the epoch, UTC
WEIGHT = "weight"  # list<float32>, one entry a candidate; optional
# The history columns: parallel lists, oldest first, one entry an event.
HISTORY_ITEM = "history_item"  # the feature (level history) that names the item of the event
HISTORY_ACTION = "history_action"  # int8: 0 = outcome unknown, else 1 + sum over tasks of 2**t * outcome_t
HISTORY_SURFACE = "history_surface"  # int8: 0 = another or unknown surface, else 1 + index in `surfaces`
HISTORY_TIME_MS = "history_time_ms"  # int64: when the event happened
HISTORY_COLUMNS = (HISTORY_ITEM, HISTORY_ACTION, HISTORY_SURFACE, HISTORY_TIME_MS)
RESERVED = (REQUEST_ID, USER_ID, TIMESTAMP_MS, WEIGHT, HISTORY_ACTION, HISTORY_SURFACE, HISTORY_TIME_MS)


class Level(StrEnum):
    """What one value of a feature belongs to."""

    REQUEST = "request"
    CANDIDATE = "candidate"
    HISTORY = "history"


class Kind(StrEnum):
    """What one value of a feature is."""

    CATEGORICAL = "categorical"
    NUMERIC = "numeric"


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """An id space: ids of it lie in [0, size).

    Args:
        name: unique name; also the name of the embedding table.
        size: number of ids. With method "index", id 0 is the unknown id.
        method: how raw values became ids: "index" (a stored list), "hash", or "given" (ids as they came).
    """

    name: str
    size: int
    method: str = "given"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise SchemaError(f"vocabulary {self.name!r} has size {self.size}; it must hold at least one id")
        if self.method not in ("index", "hash", "given"):
            raise SchemaError(
                f"vocabulary {self.name!r}: " + unknown("method", self.method, ["index", "hash", "given"])
            )


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, kw_only=True)
class Feature:
    """One column of a log.

    On disk a request-level feature is a scalar (a list when `multi_valued`), a candidate-level one is a
    list with one entry a candidate (a list of lists when `multi_valued`), a history-level one is a list
    with one entry an event. Categorical values are int64 or int32, numeric ones float32. Null means absent.

    Args:
        name: unique; the column's name.
        level: what one value belongs to.
        kind: categorical (ids of `vocabulary`) or numeric.
        surfaces: the surfaces whose logs have this column. On the others it is stored nowhere and reaches
            the model as absent.
        vocabulary: name of the id space; required for categorical features, forbidden for numeric ones.
        multi_valued: several ids a row; categorical features of level request or candidate only.
    """

    name: str
    level: Level
    kind: Kind
    surfaces: tuple[str, ...]
    vocabulary: str | None = None
    multi_valued: bool = False

    def __post_init__(self) -> None:
        if self.name in RESERVED:
            raise SchemaError(f"feature {self.name!r} takes the name of a reserved column; rename it")
        if (self.kind is Kind.CATEGORICAL) != (self.vocabulary is not None):
            raise SchemaError(
                f"feature {self.name!r} is {self.kind}; categorical features name a vocabulary, numeric ones do not"
            )
        if self.multi_valued and (self.kind is Kind.NUMERIC or self.level is Level.HISTORY):
            raise SchemaError(f"feature {self.name!r} cannot be multi_valued: only ids of requests and candidates can")
        if not self.surfaces:
            raise SchemaError(f"feature {self.name!r} exists on no surface; name at least one or drop it")


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, kw_only=True)
class DatasetSchema:
    """Everything a reader must know before it opens the first file.

    Args:
        surfaces: names in their canonical order, which is also the order of rows in a batch.
        tasks: names of the label columns (list<float32>, one entry a candidate, null = not observed).
        vocabularies: the id spaces.
        features: the columns; a history exists when one feature is `history_item`.
        history_length: the most events that a request carries; 0 without history.
        label_delay_ms: how long after an event its outcome becomes known; histories and causal features
            hold only what was known at `timestamp_ms` under this delay.
        weighted: whether every file has the column `weight` (list<float32>, one entry a candidate).

    Raises:
        SchemaError: names clash, or a feature refers to a surface or vocabulary that is not declared.
    """

    surfaces: tuple[str, ...]
    tasks: tuple[str, ...]
    vocabularies: tuple[Vocabulary, ...]
    features: tuple[Feature, ...]
    history_length: int = 0
    label_delay_ms: int = 0
    weighted: bool = False

    def __post_init__(self) -> None:
        problems: list[str] = []
        columns = [f.name for f in self.features] + list(self.tasks)
        for what, names in (
            ("surface", list(self.surfaces)),
            ("vocabulary", [v.name for v in self.vocabularies]),
            ("column", columns),
        ):
            for name in sorted({n for n in names if names.count(n) > 1}):
                problems.append(f"{what} {name!r} is declared more than once")
        if not self.surfaces:
            problems.append("no surface is declared")
        if not self.tasks:
            problems.append("no task is declared")
        for task in self.tasks:
            if task in RESERVED:
                problems.append(f"task {task!r} takes the name of a reserved column")
        vocabularies = {v.name for v in self.vocabularies}
        for f in self.features:
            if f.vocabulary is not None and f.vocabulary not in vocabularies:
                problems.append(f"feature {f.name!r}: " + unknown("vocabulary", f.vocabulary, vocabularies))
            problems += [
                f"feature {f.name!r}: " + unknown("surface", s, self.surfaces)
                for s in f.surfaces
                if s not in self.surfaces
            ]
            if f.level is Level.HISTORY and tuple(f.surfaces) != tuple(self.surfaces):
                problems.append(f"history feature {f.name!r} must exist on every surface")
        has_history = any(f.name == HISTORY_ITEM for f in self.features)
        if any(f.level is Level.HISTORY for f in self.features) and not has_history:
            problems.append(f"history features need the feature {HISTORY_ITEM!r}")
        if has_history != (self.history_length > 0):
            problems.append(
                f"history_length is {self.history_length}, yet {HISTORY_ITEM!r} is "
                f"{'declared' if has_history else 'not declared'}"
            )
        if self.label_delay_ms < 0:
            problems.append(f"label_delay_ms is {self.label_delay_ms}; it must not be negative")
        if problems:
            raise SchemaError("the schema contradicts itself:\n  - " + "\n  - ".join(problems))

    @cached_property
    def _by_name(self) -> dict[str, Feature]:
        return {f.name: f for f in self.features}

    @cached_property
    def _vocabularies(self) -> dict[str, Vocabulary]:
        return {v.name: v for v in self.vocabularies}

    @property
    def has_history(self) -> bool:
        return self.history_length > 0

    @property
    def action_count(self) -> int:
        """Number of codes of `history_action`: unknown, and one for each combination of outcomes."""
        return 1 + 2 ** len(self.tasks)

    def feature(self, name: str) -> Feature:
        """The feature called `name`.

        Raises:
            SchemaError: there is none; the message names the nearest.
        """
        if name not in self._by_name:
            raise SchemaError(unknown("feature", name, self._by_name))
        return self._by_name[name]

    def vocabulary(self, name: str) -> Vocabulary:
        """The vocabulary called `name`.

        Raises:
            SchemaError: there is none; the message names the nearest.
        """
        if name not in self._vocabularies:
            raise SchemaError(unknown("vocabulary", name, self._vocabularies))
        return self._vocabularies[name]

    def is_shared(self, feature: Feature) -> bool:
        """Whether a feature's ids meet those of another level, or of the history, in one table.

        Such candidate features hold exactly one id a candidate, so that the values of the key are the candidates.
        """
        levels = {f.level for f in self.features if f.vocabulary == feature.vocabulary}
        return feature.kind is Kind.CATEGORICAL and (len(levels) > 1 or Level.HISTORY in levels)

    def surface_index(self, name: str) -> int:
        """Position of a surface in the canonical order.

        Raises:
            SchemaError: there is no such surface; the message names the nearest.
        """
        if name not in self.surfaces:
            raise SchemaError(unknown("surface", name, self.surfaces))
        return self.surfaces.index(name)

    def select(
        self,
        *,
        level: Level | None = None,
        kind: Kind | None = None,
        surface: str | None = None,
    ) -> tuple[Feature, ...]:
        """Features that match every given condition, in declared order."""
        return tuple(
            f
            for f in self.features
            if (level is None or f.level is level)
            and (kind is None or f.kind is kind)
            and (surface is None or surface in f.surfaces)
        )
