"""Whose rows gain from unifying: users that training saw on several surfaces, or all alike.

If one model for all surfaces wins because it knows a user from elsewhere, the gain lies with users who were seen on
another surface than the one they are scored on. Gain is the drop in log loss, so that gains of groups add up to the
gain of all; intervals are over users, paired (`pipeline.evaluate.bootstrap`).
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

import numpy as np
import polars as pl

from pipeline.errors import DataError
from pipeline.evaluate.bootstrap import Estimate, UserBootstrap, estimate
from pipeline.evaluate.compare import align
from pipeline.evaluate.metrics import cross_entropy
from pipeline.evaluate.predictions import DATE, SURFACE, WEIGHT, Predictions
from pipeline.schema import USER_ID

GROUPS = ("here and elsewhere", "elsewhere only", "here only", "nowhere")


@dataclass(frozen=True, kw_only=True)
class GroupGain:
    """What the rows of one group of users gained.

    Args:
        row_share: weight of the group's rows over that of all rows.
        gain: mean drop in log loss of a row, nats.
        gain_share: the group's part of the whole gain; compare it with `row_share`.
    """

    row_share: float
    gain: Estimate
    gain_share: Estimate


def gain_by_overlap(
    better: Predictions,
    other: Predictions,
    seen: Mapping[tuple[str, str], Set[int]],
    *,
    task: str,
    resamples: int = 1000,
) -> dict[str, dict[str, GroupGain]]:
    """Gain of `better` over `other`, by surface and then by where training saw the row's user.

    Args:
        better, other: predictions of the same rows.
        seen: by (test day, surface), the users that training for this day saw on the surface.
        task: which outcome.
        resamples: resamples of the users.

    Raises:
        DataError: the rows differ, or `seen` lacks a day or surface.
    """
    aligned = align({"better": [better], "other": [other]})
    table, p_other = aligned["better"][0].table, aligned["other"][0].table[f"p_{task}"].to_numpy()
    group = _groups(table, seen)
    label = table[f"label_{task}"].cast(pl.Float64).to_numpy()
    weight = np.where(np.isnan(label), 0.0, table[WEIGHT].cast(pl.Float64).to_numpy())
    label = np.nan_to_num(label)
    gain = weight * (cross_entropy(label, p_other) - cross_entropy(label, table[f"p_{task}"].to_numpy()))
    bootstrap = UserBootstrap(table[USER_ID].to_numpy(), resamples=resamples)
    user = np.searchsorted(bootstrap.users, table[USER_ID].to_numpy())
    result = {}
    for surface in better.surfaces:
        here = (table[SURFACE] == surface).to_numpy()
        # [U, 2 * groups]: gains, then weights, summed by user and group.
        sums = np.hstack(
            [
                np.bincount(
                    (user * len(GROUPS) + group)[here], weights=v[here], minlength=bootstrap.users.size * len(GROUPS)
                ).reshape(-1, len(GROUPS))
                for v in (gain, weight)
            ]
        )
        sampled = np.concatenate([counts @ sums for counts in bootstrap.counts(sums.shape[1])])
        result[surface] = _gains(sampled[:, : len(GROUPS)], sampled[:, len(GROUPS) :])
    return result


def _groups(table: pl.DataFrame, seen: Mapping[tuple[str, str], Set[int]]) -> np.ndarray:
    """Index into GROUPS of each row, int64 [N]."""
    surfaces = sorted({s for _, s in seen})
    result = np.empty(table.height, dtype=np.int64)
    for (surface, day), rows in table.with_row_index("row").group_by(SURFACE, DATE):
        for name in surfaces:
            if (day, name) not in seen:
                raise DataError(f"the users that training saw for {day} on {name} are not given", column=USER_ID)
        if surface not in surfaces:
            raise DataError(f"the users that training saw on {surface} are not given", column=USER_ID)
        users = rows[USER_ID].to_numpy()
        here = np.isin(users, np.fromiter(seen[str(day), str(surface)], dtype=np.int64))
        elsewhere = np.zeros(users.size, dtype=bool)
        for name in surfaces:
            if name != surface:
                elsewhere |= np.isin(users, np.fromiter(seen[str(day), name], dtype=np.int64))
        result[rows["row"].to_numpy()] = np.where(here, np.where(elsewhere, 0, 2), np.where(elsewhere, 1, 3))
    return result


def _gains(gain: np.ndarray, weight: np.ndarray) -> dict[str, GroupGain]:
    """From sums by group in each resample, [1 + B, groups]."""
    with np.errstate(divide="ignore", invalid="ignore"):
        mean, share = gain / weight, gain / gain.sum(axis=1, keepdims=True)
    empty = "no row of such a user"
    return {
        name: GroupGain(
            row_share=float(weight[0, i] / weight[0].sum()),
            gain=estimate(mean[:, i], reason="" if weight[0, i] else empty),
            gain_share=estimate(share[:, i], reason="" if weight[0, i] else empty),
        )
        for i, name in enumerate(GROUPS)
    }
