"""What an artifact says of itself: which columns it wants, which probabilities it gives, within which bounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from pipeline.data.layout import FeatureLayout
from pipeline.data.logs import column_type
from pipeline.errors import ArtifactError, SchemaError
from pipeline.schema import (
    HISTORY_ACTION,
    HISTORY_SURFACE,
    HISTORY_TIME_MS,
    TIMESTAMP_MS,
    DatasetSchema,
    Kind,
    Level,
)
from pipeline.serve.tables import TableDtype
from pipeline.serve.tensors import TensorPlan

_HISTORY_TYPES = {HISTORY_ACTION: pa.int8(), HISTORY_SURFACE: pa.int8(), HISTORY_TIME_MS: pa.int64()}


@dataclass(frozen=True, kw_only=True)
class TensorInput:
    """One input of the program.

    Args:
        name: of the tensor.
        dtype: such as int64.
        shape: a number for a fixed axis, a letter for a free one (see `pipeline.serve.tensors`).
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, kw_only=True)
class Signature:
    """Content of `signature.json`.

    Args:
        format_version: of the artifact's layout.
        surface: the one that is served.
        tasks: columns of the result, in order.
        dtype: how table values are stored.
        history_length: events of a history that are read, the newest; older ones are dropped.
        max_requests: most requests, and so users, in one run of the program; more are split, or refused on request.
        max_candidates: most candidate slots in one run, requests times the most candidates of one of them; one
            request with more is run in parts.
        schema: features that are read, with level, kind and vocabulary. It keeps all surfaces and tasks of the log,
            because the codes of history columns count them.
        layout: which column feeds which input.
        tensors: which rows of the packed tables a column's ids read.
        inputs: of the program, in order.
        weights: digest of every table and dense weight; deltas name it (see `pipeline.serve.delta`).
        key_maps: vocabularies whose raw keys and ids lie in `vocabularies/NAME.parquet`.
    """

    format_version: Literal[2]
    surface: str
    tasks: tuple[str, ...]
    dtype: TableDtype
    history_length: int
    max_requests: int
    max_candidates: int
    schema: DatasetSchema
    layout: FeatureLayout
    tensors: TensorPlan
    inputs: tuple[TensorInput, ...]
    weights: str
    key_maps: tuple[str, ...]

    def columns(self, level: Level) -> Mapping[str, pa.DataType]:
        """Columns that rows must have, and their types in the log format, of one level."""
        return self._columns[level]

    @cached_property
    def _columns(self) -> dict[Level, dict[str, pa.DataType]]:
        return {level: self._columns_of(level) for level in Level}

    def _columns_of(self, level: Level) -> dict[str, pa.DataType]:
        found = {f.name: column_type(f) for f in self.schema.select(level=level, surface=self.surface)}
        if level is Level.HISTORY and found:
            found |= {name: pa.list_(of) for name, of in _HISTORY_TYPES.items()}
        if level is Level.REQUEST and self.layout.has_history:
            found[TIMESTAMP_MS] = pa.int64()
        return found

    @cached_property
    def single_ids(self) -> dict[Level, tuple[str, ...]]:
        """Features of one id a row, by level."""
        return {
            level: tuple(
                f.name
                for f in self.schema.select(level=level, kind=Kind.CATEGORICAL, surface=self.surface)
                if not f.multi_valued
            )
            for level in Level
        }

    @cached_property
    def sizes(self) -> dict[Level, np.ndarray]:
        """Number of ids of each of `single_ids`."""
        return {
            level: np.array([self.schema.vocabulary(self.schema.feature(n).vocabulary or "").size for n in names])
            for level, names in self.single_ids.items()
        }

    @cached_property
    def bulk_checked(self) -> frozenset[str]:
        """Columns that `pipeline.serve.rows` checks many at a time."""
        numeric = [name for names in self.tensors.numeric.values() for name in names]
        return frozenset(numeric).union(*self.single_ids.values())


def served_schema(schema: DatasetSchema, layout: FeatureLayout, surface: str) -> DatasetSchema:
    """The part of a log's schema that an artifact of `surface` reads."""
    features = tuple(f for f in schema.select(surface=surface) if f.name in layout.features)
    used = {f.vocabulary for f in features}
    return replace(
        schema,
        features=features,
        vocabularies=tuple(v for v in schema.vocabularies if v.name in used),
        history_length=schema.history_length if layout.has_history else 0,
        weighted=False,
    )


_SIGNATURE = TypeAdapter(Signature)


def signature_to_json(signature: Signature) -> bytes:
    """The whole signature."""
    return _SIGNATURE.dump_json(signature, indent=1)


def read_signature(path: Path) -> Signature:
    """A signature read back.

    Raises:
        ArtifactError: the file is no signature of this version.
    """
    try:
        return _SIGNATURE.validate_json(path.read_bytes())
    except ValidationError as error:
        lines = [f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors()[:5]]
        raise ArtifactError(f"{path} is not a signature of this version: " + "; ".join(lines)) from error
    except (OSError, SchemaError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
