"""Faults of serving, planted to see that the canary finds them: a feature that is lost or in other units."""

from __future__ import annotations

import math
from dataclasses import dataclass

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import ConfigError, unknown
from pipeline.evaluate.predictions import Predictions
from pipeline.schema import DatasetSchema, Kind, Level

SCORES = "scores"  # in place of a feature: the model's own probabilities


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What becomes of one feature of the candidate's requests.

    Args:
        surface: whose requests.
        feature: numeric; or `scores`.
        factor: that its values are multiplied by; None loses them.
    """

    surface: str
    feature: str
    factor: float | None

    def __str__(self) -> str:
        what = "lost" if self.factor is None else f"times {self.factor:g}"
        return f"{self.feature} {what}"

    def apply(self, rows: pa.Table, schema: DatasetSchema) -> pa.Table:
        """The rows as the faulty feature store would have sent them."""
        if self.feature == SCORES:
            return rows
        feature = schema.feature(self.feature)
        column = rows[self.feature].combine_chunks()
        values = column.flatten() if feature.level is Level.CANDIDATE else column
        if self.factor is None:
            changed = pa.nulls(len(values), values.type)
        else:
            changed = pc.cast(pc.multiply(values, self.factor), values.type)
        if feature.level is Level.CANDIDATE:
            changed = pa.ListArray.from_arrays(pc.subtract(column.offsets, column.offsets[0]).cast(pa.int32()), changed)
        return rows.set_column(rows.column_names.index(self.feature), self.feature, changed)

    def distort(self, predictions: Predictions) -> Predictions:
        """The scores as they reach the auction, where the fault lies behind the model."""
        if self.feature != SCORES or self.factor is None:
            return predictions
        changed = ((pl.col(f"p_{t}") * self.factor).clip(0, 1) for t in predictions.tasks)
        return Predictions(predictions.table.with_columns(changed))


def parse_fault(text: str, schema: DatasetSchema) -> Fault:
    """A fault written SURFACE:FEATURE (lost) or SURFACE:FEATURE*FACTOR.

    Raises:
        ConfigError: the form is another, or there is no such surface or numeric feature.
    """
    surface, colon, rest = text.partition(":")
    feature, star, factor = rest.partition("*")
    known = [SCORES] if star else []
    if not colon or not feature or (star and not factor):
        raise ConfigError(f"fault {text!r} is not written SURFACE:FEATURE or SURFACE:FEATURE*FACTOR, as sr:price*100")
    if surface not in schema.surfaces:
        raise ConfigError("--fault: " + unknown("surface", surface, schema.surfaces))
    numeric = known + [
        f.name for f in schema.select(kind=Kind.NUMERIC, surface=surface) if f.level is not Level.HISTORY
    ]
    if feature not in numeric:
        raise ConfigError("--fault: " + unknown("numeric feature", feature, numeric))
    try:
        value = float(factor) if star else None
    except ValueError:
        value = math.nan
    if value is not None and not (math.isfinite(value) and (value > 0 or feature != SCORES)):
        raise ConfigError(f"fault {text!r}: {factor!r} is no number to multiply by")
    return Fault(surface=surface, feature=feature, factor=value)
