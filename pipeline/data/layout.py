"""Which column of a log goes to which input of the model.

Ids that meet across levels (the item of a history event, of a candidate, the related pin of a request)
share one table in an EmbeddingCollection; all other categorical features are pooled in bags at the level
they belong to. See docs/architecture.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from pipeline.errors import SchemaError, unknown
from pipeline.schema import HISTORY_ITEM, DatasetSchema, Kind, Level


@dataclass(frozen=True, kw_only=True)
class FeatureLayout:
    """Names of columns by the input that they feed, each in the order of its rows, keys or columns.

    Args:
        surfaces: the surfaces of the model, in batch order.
        tasks: the label columns.
        request_bags: keys of `ModelInputs.request_ids`.
        candidate_bags: keys of `ModelInputs.candidate_ids`.
        history_sequences: history-level keys of `ModelInputs.sequence_ids` (they come first).
        request_sequences: its request-level keys; zero or one id a request.
        candidate_sequences: its candidate-level keys; exactly one id a candidate.
        request_numeric: columns of `ModelInputs.request_numeric`.
        candidate_numeric: columns of `ModelInputs.candidate_numeric`.
        history_numeric: columns of `ModelInputs.history_numeric`.
        vocabularies: vocabulary of every categorical feature above.
    """

    surfaces: tuple[str, ...]
    tasks: tuple[str, ...]
    request_bags: tuple[str, ...]
    candidate_bags: tuple[str, ...]
    history_sequences: tuple[str, ...]
    request_sequences: tuple[str, ...]
    candidate_sequences: tuple[str, ...]
    request_numeric: tuple[str, ...]
    candidate_numeric: tuple[str, ...]
    history_numeric: tuple[str, ...]
    vocabularies: dict[str, str]

    @property
    def sequence_keys(self) -> tuple[str, ...]:
        return self.history_sequences + self.request_sequences + self.candidate_sequences

    @property
    def has_history(self) -> bool:
        return HISTORY_ITEM in self.history_sequences

    @property
    def features(self) -> frozenset[str]:
        """Every feature that the model reads."""
        return frozenset(
            self.request_bags
            + self.candidate_bags
            + self.sequence_keys
            + self.request_numeric
            + self.candidate_numeric
            + self.history_numeric
        )


def feature_layout(
    schema: DatasetSchema,
    *,
    surfaces: tuple[str, ...],
    tasks: tuple[str, ...],
    exclude: tuple[str, ...] = (),
) -> FeatureLayout:
    """The layout of a model that reads `surfaces`: every feature that at least one of them has.

    Args:
        schema: what the log holds.
        surfaces: the model's surfaces; their order is the order of rows in a batch.
        tasks: the label columns that the model predicts.
        exclude: features to leave out, by name or shell pattern such as `*_rate_*` (`history_item` leaves out the
            whole history).

    Raises:
        SchemaError: an unknown surface, task or feature; or a feature that an EmbeddingCollection cannot hold.
    """
    for surface in surfaces:
        schema.surface_index(surface)
    for task in tasks:
        if task not in schema.tasks:
            raise SchemaError(unknown("task", task, schema.tasks))
    excluded = _matching(schema, exclude)
    drop_history = HISTORY_ITEM in excluded
    used = [
        f
        for f in schema.features
        if f.name not in excluded
        and not (drop_history and f.level is Level.HISTORY)
        and any(s in surfaces for s in f.surfaces)
    ]
    categorical = [f for f in used if f.kind is Kind.CATEGORICAL]
    levels: dict[str, set[Level]] = {}
    for f in categorical:
        levels.setdefault(f.vocabulary or "", set()).add(f.level)
    shared = {v for v, at in levels.items() if len(at) > 1 or Level.HISTORY in at}
    for f in categorical:
        if f.vocabulary not in shared:
            continue
        if f.multi_valued:
            raise SchemaError(
                f"feature {f.name!r} is multi_valued, and its vocabulary {f.vocabulary!r} is used at several levels; "
                "give it a vocabulary of its own"
            )
        missing = [s for s in surfaces if s not in f.surfaces]
        if f.level is Level.CANDIDATE and missing:
            raise SchemaError(
                f"candidate feature {f.name!r} shares vocabulary {f.vocabulary!r} with another level, so every surface "
                f"needs it; {', '.join(missing)} lacks it. Give it a vocabulary of its own or exclude it"
            )

    def names(level: Level, kind: Kind, in_shared: bool | None = None) -> tuple[str, ...]:
        return tuple(
            f.name
            for f in used
            if f.level is level and f.kind is kind and (in_shared is None or (f.vocabulary in shared) is in_shared)
        )

    return FeatureLayout(
        surfaces=surfaces,
        tasks=tasks,
        request_bags=names(Level.REQUEST, Kind.CATEGORICAL, False),
        candidate_bags=names(Level.CANDIDATE, Kind.CATEGORICAL, False),
        history_sequences=names(Level.HISTORY, Kind.CATEGORICAL, True),
        request_sequences=names(Level.REQUEST, Kind.CATEGORICAL, True),
        candidate_sequences=names(Level.CANDIDATE, Kind.CATEGORICAL, True),
        request_numeric=names(Level.REQUEST, Kind.NUMERIC),
        candidate_numeric=names(Level.CANDIDATE, Kind.NUMERIC),
        history_numeric=names(Level.HISTORY, Kind.NUMERIC),
        vocabularies={f.name: f.vocabulary or "" for f in categorical},
    )


def _matching(schema: DatasetSchema, patterns: tuple[str, ...]) -> frozenset[str]:
    """Features named by the patterns; a pattern that names none is an error."""
    names = [f.name for f in schema.features]
    matched: set[str] = set()
    for pattern in patterns:
        found = [n for n in names if fnmatchcase(n, pattern)]
        if not found:
            raise SchemaError("exclude: " + unknown("feature", pattern, names))
        matched.update(found)
    return frozenset(matched)
