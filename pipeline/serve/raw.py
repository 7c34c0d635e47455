"""Raw rows: the keys and numbers of the flat log, before ingest made ids and features of them.

An artifact of an ingested log carries what ingest did to each feature that it reads (`preprocessing.json`) and, for
vocabularies by stored lists, the lists (`vocabularies/NAME.parquet`). Rows whose columns have the features' names and
raw values (a video's id as it came, "12,7" where the log joins tags by a comma, seconds where the feature is a bucket)
become the ids and numbers that training saw, by the code of ingest itself.

What is not here: expressions over other columns of the log, side tables, histories and rates from earlier outcomes.
Whoever serves keeps these in a feature store and gives their values, rates as the numbers that they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.data.columns import one_array
from pipeline.data.ingest.ids import UNKNOWN, Ids
from pipeline.data.ingest.prepare import encode_feature
from pipeline.data.ingest.source import raw_feature, text
from pipeline.data.ingest.spec import FeatureSpec, IngestSpec, VocabularySpec
from pipeline.errors import ArtifactError, DataError, unknown
from pipeline.schema import TIMESTAMP_MS, DatasetSchema, Level

_AGE_MS = {"day": 86_400_000.0, "hour": 3_600_000.0}


class Preprocessing(BaseModel):
    """Content of `preprocessing.json`.

    Args:
        format_version: of this layout.
        timezone: of local times in text.
        features: what became of each feature of the log that the artifact reads; the others are given as they are.
        vocabularies: how keys become ids.
        history: vocabulary of each history column of ids.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1]
    timezone: str
    features: dict[str, FeatureSpec]
    vocabularies: dict[str, VocabularySpec]
    history: dict[str, str]


def preprocessing_of(provenance: Mapping[str, Any], schema: DatasetSchema) -> Preprocessing | None:
    """The rules for the features of a served schema; None where the log was not made by a spec.

    Args:
        provenance: of the log.
        schema: the part of the log's that an artifact reads.
    """
    if "spec" not in provenance:
        return None
    spec = IngestSpec.model_validate(provenance["spec"])
    names = {f.name for f in schema.features}
    # A raw row has a column for each feature, whatever expression made it of the log.
    features = {f.name: f.model_copy(update={"column": f'"{f.name}"'}) for f in spec.features if f.name in names}
    history = {f.name: f.vocabulary for f in schema.select(level=Level.HISTORY) if f.vocabulary is not None}
    used = {f.vocabulary for f in features.values()} | set(history.values())
    sizes = {v.name: v.size for v in schema.vocabularies}
    return Preprocessing(
        format_version=1,
        timezone=spec.days.timezone,
        features=features,
        vocabularies={
            n: v.model_copy(update={"size": sizes[n]}) for n, v in spec.vocabularies.items() if n in used and n in sizes
        },
        history={n: v for n, v in history.items() if v in spec.vocabularies},
    )


@dataclass(frozen=True, kw_only=True)
class SortedIds(Ids):
    """Ids whose list is sorted by key once, for many small look-ups. Its table holds key and id, by key."""

    def encode(self, keys: pl.Series) -> pl.Series:
        """Ids of keys; see `Ids.encode`."""
        if self.spec.method != "index" or not len(self.table):
            return super().encode(keys)
        known = self.table["key"]
        place = known.search_sorted(keys.fill_null("")).clip(0, len(known) - 1)
        found = pl.DataFrame({"key": keys, "known": known.gather(place), "id": self.table["id"].gather(place)})
        ids = pl.when(pl.col("key") == pl.col("known")).then(pl.col("id")).otherwise(UNKNOWN)
        return found.select(pl.when(pl.col("key").is_not_null()).then(ids)).to_series()


class RawRows:
    """Turns raw rows into rows of ids and numbers.

    Args:
        rules: of the artifact.
        ids: by vocabulary.
        schema: of the artifact.
        surface: of the artifact.
    """

    def __init__(self, rules: Preprocessing, ids: Mapping[str, Ids], schema: DatasetSchema, surface: str) -> None:
        self._rules, self._ids, self._schema, self._surface = rules, dict(ids), schema, surface

    @staticmethod
    def open(path: Path, folder: Path, schema: DatasetSchema, surface: str) -> RawRows:
        """Read the rules and the lists of keys of a checked artifact.

        Args:
            path: of the rules.
            folder: of the lists.
            schema: of the artifact.
            surface: of the artifact.

        Raises:
            ArtifactError: they are not rules of this version, or a list is missing.
        """
        try:
            rules = Preprocessing.model_validate_json(path.read_bytes())
        except ValidationError as error:
            lines = [f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors()[:5]]
            raise ArtifactError(f"{path} does not hold rules of this version: " + "; ".join(lines)) from error
        ids: dict[str, Ids] = {}
        for name, spec in rules.vocabularies.items():
            source = folder / f"{name}.parquet"
            if spec.method != "index":
                ids[name] = Ids.build(name, spec, pl.DataFrame())
            elif source.is_file():
                ids[name] = SortedIds(name=name, spec=spec, table=pl.read_parquet(source).sort("key"))
            else:
                raise ArtifactError(f"{path} wants the keys of vocabulary {name!r}, and there is no {source}")
        return RawRows(rules, ids, schema, surface)

    def encode(self, table: pa.Table, source: str) -> pa.Table:
        """The same rows with ids and numbers; flat or grouped as they came. Columns that are not read stay.

        Args:
            table: raw rows.
            source: what to call the table in errors.

        Raises:
            DataError: a column is missing or holds what its rule cannot read.
        """
        grouped = self._is_grouped(table)
        for feature in self._schema.select(surface=self._surface):
            rule = self._rules.features.get(feature.name)
            vocabulary = self._rules.history.get(feature.name)
            if rule is None and vocabulary is None:
                continue
            if feature.name not in table.column_names:
                raise DataError(unknown("column", feature.name, table.column_names), file=source, column=feature.name)
            array = one_array(table[feature.name])
            nested = feature.level is Level.HISTORY or (grouped and feature.level is Level.CANDIDATE)
            try:
                flat = _flat(array) if nested else array
                if rule is None:
                    encoded = self._keys(flat, vocabulary or "")
                else:
                    owner = _owner(array) if nested else None
                    encoded = self._feature(flat, rule, self._now(table, rule, owner, source))
            except (pl.exceptions.PolarsError, pa.ArrowInvalid) as error:
                raise DataError(f"raw values cannot be read: {error}", file=source, column=feature.name) from error
            except DataError as error:
                raise DataError(error.problem, file=source, column=feature.name) from error
            place = table.column_names.index(feature.name)
            table = table.set_column(place, feature.name, _nest(array, encoded) if nested else encoded)
        return table

    def _is_grouped(self, table: pa.Table) -> bool:
        """Whether candidate columns are lists of candidates."""
        for feature in self._schema.select(level=Level.CANDIDATE, surface=self._surface):
            if feature.name in table.column_names:
                rule = self._rules.features.get(feature.name)
                of = table.schema.field(feature.name).type
                if feature.multi_valued and (rule is None or rule.separator is None):
                    of = of.value_type if _is_list(of) else of
                return _is_list(of)
        return False

    def _keys(self, flat: pa.Array, vocabulary: str) -> pa.Array:
        series = pl.Series("x", pl.from_arrow(flat))
        keys = pl.DataFrame(series).select(text(pl.col("x"), series.dtype)).to_series()
        return _arrow(self._ids[vocabulary].encode(keys))

    def _feature(self, flat: pa.Array, rule: FeatureSpec, now: pl.Series | None) -> pa.Array:
        frame = pl.DataFrame(pl.Series(rule.name, pl.from_arrow(flat)))
        expression = raw_feature(frame.lazy(), rule, self._rules.timezone, Path("the given rows"))
        values = frame.select(expression.alias(rule.name)).to_series()
        if rule.vocabulary is None and rule.age is None and values.null_count() > frame[rule.name].null_count():
            wrong = frame[rule.name].filter(values.is_null() & frame[rule.name].is_not_null())[0]
            raise DataError(f"the column holds {wrong!r}, which is no number")
        if rule.age is not None and now is not None:
            values = (now - values).clip(lower_bound=0.0) / _AGE_MS[rule.age.unit]
            rule = rule.model_copy(update={"age": None})
        return _arrow(encode_feature(rule, values, self._ids))

    def _now(self, table: pa.Table, rule: FeatureSpec, owner: pl.Series | None, source: str) -> pl.Series | None:
        if rule.age is None:
            return None
        if TIMESTAMP_MS not in table.column_names:
            raise DataError(f"{rule.name} is an age, so rows need the time of their request", file=source)
        now = pl.Series(pl.from_arrow(one_array(table[TIMESTAMP_MS]))).cast(pl.Float64)
        return now if owner is None else now.gather(owner)


def _arrow(series: pl.Series) -> pa.Array:
    array = series.to_arrow()
    if pa.types.is_large_list(array.type):
        array = array.cast(pa.list_(array.type.value_type))
    return array


def _is_list(of: pa.DataType) -> bool:
    return pa.types.is_list(of) or pa.types.is_large_list(of)


def _flat(array: pa.Array) -> pa.Array:
    if not _is_list(array.type):
        raise DataError(f"the column has type {array.type}, it must be a list")
    return array.flatten()


def _owner(array: pa.Array) -> pl.Series:
    lengths = array.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    return pl.Series(np.repeat(np.arange(len(array)), lengths))


def _nest(array: pa.Array, flat: pa.Array) -> pa.Array:
    """Lists of the same lengths with other entries; a null list stays one."""
    lengths = array.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    return pa.ListArray.from_arrays(offsets, flat, mask=array.is_null() if array.null_count else None)
