"""The schema of the log that a spec makes."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.data.ingest.ids import Ids
from pipeline.data.ingest.rates import rate_columns, rate_level
from pipeline.data.ingest.session import SESSION_FEATURES
from pipeline.data.ingest.similarity import similarity_columns
from pipeline.data.ingest.spec import IngestSpec
from pipeline.schema import DatasetSchema, Feature, Kind, Level, Vocabulary


def causal_features(spec: IngestSpec) -> dict[str, Level]:
    """Names and levels of the causal features, in order."""
    found = {name: rate_level(spec, r) for r in spec.causal.rates for name in rate_columns(spec, r)}
    if spec.causal.session is not None:
        found |= dict.fromkeys(SESSION_FEATURES, Level.REQUEST)
    if spec.causal.similarity is not None:
        found |= dict.fromkeys(similarity_columns(spec), Level.CANDIDATE)
    return found


def dataset_schema(spec: IngestSpec, ids: Mapping[str, Ids]) -> DatasetSchema:
    """The schema of the log that a spec makes, given its id spaces.

    Raises:
        SchemaError: a causal feature has the name of another column.
    """
    vocabularies = [Vocabulary(name=n, size=ids[n].size, method=v.method) for n, v in spec.vocabularies.items()]
    vocabularies += [Vocabulary(name=f.name, size=len(f.buckets) + 2) for f in spec.features if f.buckets is not None]
    features = [
        Feature(
            name=f.name,
            level=Level(f.level),
            kind=Kind.NUMERIC if f.numeric else Kind.CATEGORICAL,
            surfaces=tuple(s for s in spec.surfaces if f.surfaces is None or s in f.surfaces),
            vocabulary=f.vocabulary_name,
            multi_valued=f.is_multi,
        )
        for f in spec.features
    ]
    features += [
        Feature(name=name, level=level, kind=Kind.NUMERIC, surfaces=spec.surfaces)
        for name, level in causal_features(spec).items()
    ]
    features += [
        Feature(
            name=name,
            level=Level.HISTORY,
            kind=Kind.CATEGORICAL,
            surfaces=spec.surfaces,
            vocabulary=spec.feature(feature).vocabulary_name,
        )
        for name, feature in (spec.history.features if spec.history else {}).items()
    ]
    return DatasetSchema(
        surfaces=spec.surfaces,
        tasks=tuple(spec.tasks),
        vocabularies=tuple(vocabularies),
        features=tuple(features),
        history_length=spec.history.length if spec.history else 0,
        label_delay_ms=spec.delay_ms,
        weighted=spec.weight is not None,
    )
