"""Whether evaluation days look like training days: coverage and drift of each feature that an artifact reads.

Drift is the population stability index, sum over bins of (q - p) * ln(q / p) with p the shares of training rows and q
those of evaluation rows; 0.1 is customarily a small shift and 0.25 an alarm (Siddiqi, "Credit Risk Scorecards", 2006,
who takes it from the J-divergence of Jeffreys, 1946). Bins are deciles of training values, or the 20 commonest ids and
the rest. Half a row is added to each bin, so that an empty one does not make the index infinite. Small samples alone
give an index of about (bins - 1) * (1/n + 1/m).
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.logs import Dataset
from pipeline.rollout.measurements import FeatureMeasurements
from pipeline.schema import HISTORY_ITEM, Feature, Kind, Level
from pipeline.serve.parity import held_out
from pipeline.serve.signature import Signature

BINS = 10
COMMONEST = 20
HISTORY = "history_events"  # what stands for all history columns: the number of events
_SAMPLE = 200_000


def feature_measurements(
    signature: Signature, dataset: Dataset, training_days: tuple[str, ...], evaluation_days: tuple[str, ...]
) -> dict[str, FeatureMeasurements]:
    """By feature of the artifact; rows are taken from row groups spread evenly over the days.

    A history counts as present where it has an event, and drifts by its number of events.
    """
    before, after = (held_out(dataset, signature.surface, days, _SAMPLE) for days in (training_days, evaluation_days))
    found = {}
    for feature in signature.schema.select(surface=signature.surface):
        if feature.level is Level.HISTORY:
            if feature.name == HISTORY_ITEM:
                lengths = [pc.fill_null(pc.list_value_length(t[feature.name]), 0).to_numpy() for t in (before, after)]
                found[HISTORY] = FeatureMeasurements(
                    coverage_training=float((lengths[0] > 0).mean()),
                    coverage_evaluation=float((lengths[1] > 0).mean()),
                    drift=drift_of_numbers(*(x.astype(np.float64) for x in lengths)),
                )
            continue
        (was, old), (now, new) = (_values(t[feature.name], feature) for t in (before, after))
        index = drift_of_numbers if feature.kind is Kind.NUMERIC else drift_of_ids
        found[feature.name] = FeatureMeasurements(coverage_training=was, coverage_evaluation=now, drift=index(old, new))
    return found


def _values(column: pa.ChunkedArray, feature: Feature) -> tuple[float, np.ndarray]:
    """Share of requests (or candidates) where the feature is present, and its values there."""
    array = column.combine_chunks()
    if feature.level is Level.CANDIDATE:
        array = array.flatten()
    if not feature.multi_valued:
        present = array.drop_null()
        return len(present) / max(1, len(array)), present.to_numpy(zero_copy_only=False)
    filled = pc.sum(pc.greater(pc.fill_null(pc.list_value_length(array), 0), 0)).as_py() or 0
    return filled / max(1, len(array)), pc.list_flatten(array).drop_null().to_numpy(zero_copy_only=False)


def drift_of_numbers(before: np.ndarray, after: np.ndarray) -> float | None:
    """Index over deciles of `before`; None where either is empty. Equal values share a bin."""
    if not before.size or not after.size:
        return None
    edges = np.unique(np.quantile(before, np.arange(1, BINS) / BINS))
    bins = [np.bincount(np.searchsorted(edges, x, side="right"), minlength=edges.size + 1) for x in (before, after)]
    return stability_index(*bins)


def drift_of_ids(before: np.ndarray, after: np.ndarray) -> float | None:
    """Index over the commonest ids of `before` and the rest; None where either is empty."""
    if not before.size or not after.size:
        return None
    ids, counts = np.unique(before, return_counts=True)
    common = np.sort(ids[np.argsort(-counts, kind="stable")[:COMMONEST]])
    bins = []
    for values in (before, after):
        place = np.minimum(np.searchsorted(common, values), common.size - 1)
        bins.append(np.bincount(np.where(common[place] == values, place, common.size), minlength=common.size + 1))
    return stability_index(*bins)


def stability_index(before: np.ndarray, after: np.ndarray) -> float:
    """Population stability index of two histograms over the same bins.

    >>> round(stability_index(np.array([50, 50]), np.array([80, 20])), 2)
    0.41
    """
    kept = (before + after) > 0
    p, q = (x[kept] + 0.5 for x in (before, after))
    p, q = p / p.sum(), q / q.sum()
    return float(((q - p) * np.log(q / p)).sum())
