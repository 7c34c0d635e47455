"""Watching a candidate beside the model that it shall replace: who sees it, when to stop, and what to say of it.

A stable hash of the user chooses who is served by the candidate. What is watched are means over users of per-user sums,
so that rows of one user, which are not independent, make one observation. After any number of users they are held
against bounds by a confidence sequence: an interval that holds its mean at all times at once with probability
1 - alpha, so that one may look as often as one likes and stop when one likes. It is the asymptotic confidence sequence
of Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas, "Time-uniform central limit theory and asymptotic confidence
sequences", Annals of Statistics 52 (2024), theorem 2.2; with t observations of mean m and variance v

    m -+ sqrt(v * 2 (t rho^2 + 1) / (t^2 rho^2) * log(sqrt(t rho^2 + 1) / alpha))

rho makes it narrowest at a chosen time (their appendix B.2). The idea of peeking without penalty is that of the mixture
sequential probability ratio test: Johari, Koomen, Pekelis and Walsh, "Always Valid Inference", Operations Research 70
(2022). alpha is divided by the number of statistics that are watched (Bonferroni).

Letters: N rows, U users of the candidate's share.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl
from pydantic import ConfigDict, TypeAdapter, with_config

from pipeline.errors import DataError
from pipeline.evaluate.compare import align
from pipeline.evaluate.metrics import cross_entropy
from pipeline.evaluate.predictions import Predictions
from pipeline.rollout.measurements import Interval
from pipeline.rollout.plan import CanaryPlan
from pipeline.schema import TIMESTAMP_MS, USER_ID, WEIGHT

Verdict = Literal["harm", "safe", "undecided"]
CANDIDATE, CONTROL = "candidate", "control"
# The confidence sequence leans on the central limit theorem; below this many users it says nothing.
FEWEST_USERS = 30
_STRICT = ConfigDict(extra="forbid")


@with_config(_STRICT)
@dataclass(frozen=True, kw_only=True)
class Look:
    """The state after some users.

    Args:
        users: seen so far.
        time_ms: of the last row seen.
        statistics: by name, `task/loss` (candidate less control, mean over users of their mean log loss),
            `task/above` (mean of sum p - high * sum label: positive means that the ratio is above its bound) and
            `task/below` (the same with the low bound: negative means that it is below).
        verdict: that this look alone would give.
        reasons: for it.
    """

    users: int
    time_ms: int
    statistics: dict[str, Interval]
    verdict: Verdict
    reasons: tuple[str, ...]


@with_config(_STRICT)
@dataclass(frozen=True, kw_only=True)
class CanaryResult:
    """What the watch came to.

    Args:
        surface: that was watched.
        users: in the candidate's share.
        rows: of them.
        looks: until the stop, or all of them.
        verdict: harm (stopped at once), safe (shown to do no harm beyond the margin), or undecided.
        reasons: for it.
    """

    surface: str
    users: int
    rows: int
    looks: tuple[Look, ...]
    verdict: Verdict
    reasons: tuple[str, ...]


CANARY_RESULT = TypeAdapter(CanaryResult)


def serves(user_id: np.ndarray, share: float, salt: str) -> np.ndarray:
    """Whether the candidate serves each user: bool [N], a function of user and salt alone, growing with the share.

    SplitMix64 (Steele, Lea and Flood, 2014) of the id and a seed made from the salt.
    """
    seed = np.uint64(int.from_bytes(hashlib.sha256(salt.encode()).digest()[:8], "little"))
    with np.errstate(over="ignore"):
        z = user_id.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + seed
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    # The top 53 bits are a number in [0, 1) that a float holds exactly.
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53 < share


def confidence_sequence(
    mean: np.ndarray, variance: np.ndarray, count: np.ndarray, *, alpha: float, narrowest_at: float
) -> np.ndarray:
    """Half-widths of the asymptotic confidence sequence, of the shape of its inputs.

    Args:
        mean: only its shape matters.
        variance: of the observations so far.
        count: t, observations so far.
        alpha: chance that the mean ever leaves the sequence.
        narrowest_at: t at which it is about narrowest.
    """
    rho2 = (-2 * math.log(alpha) + math.log(-2 * math.log(alpha)) + 1) / narrowest_at
    t = np.broadcast_to(np.asarray(count, dtype=np.float64), mean.shape)
    return np.sqrt(variance * 2 * (t * rho2 + 1) / (t**2 * rho2) * np.log(np.sqrt(t * rho2 + 1) / alpha))


def watch(candidate: Predictions, control: Predictions, plan: CanaryPlan, tasks: Sequence[str]) -> CanaryResult:
    """Watch the candidate on the rows of its share of users, in the order in which users were last seen.

    Args:
        candidate: its scores of one surface's rows.
        control: the scores of the model that it shall replace, of the same rows.
        plan: share, margins and alpha.
        tasks: that both predict.

    Raises:
        DataError: the two do not hold the same rows, of one surface; or the share holds no user.
    """
    aligned = align({CANDIDATE: [candidate], CONTROL: [control]})
    table = aligned[CANDIDATE][0].table
    chosen = serves(table[USER_ID].to_numpy(), plan.share, plan.salt)
    if len(aligned[CANDIDATE][0].surfaces) != 1 or not chosen.any():
        raise DataError("a canary watches one surface, on which some user is in the candidate's share")
    rows = table.filter(chosen)
    control_rows = aligned[CONTROL][0].table.filter(chosen)
    names, values_UK, last_U = _per_user(rows, control_rows, plan, tasks)
    users = last_U.size
    looks: list[Look] = []
    for seen in np.unique(np.ceil(np.arange(1, plan.looks + 1) * users / plan.looks).astype(int)):
        if seen < min(FEWEST_USERS, users):
            continue
        looks.append(_look(names, values_UK[:seen], int(last_U[seen - 1]), plan, users))
        if looks[-1].verdict == "harm":
            break
    end = looks[-1]
    return CanaryResult(
        surface=aligned[CANDIDATE][0].surfaces[0],
        users=users,
        rows=rows.height,
        looks=tuple(looks),
        verdict=end.verdict,
        reasons=end.reasons,
    )


def _per_user(
    rows: pl.DataFrame, control: pl.DataFrame, plan: CanaryPlan, tasks: Sequence[str]
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names [K] and values [U, K] of the statistics of each user, and the time [U] of the last row, sorted by it."""
    users, place = np.unique(rows[USER_ID].to_numpy(), return_inverse=True)
    last = np.zeros(users.size, np.int64)
    np.maximum.at(last, place, rows[TIMESTAMP_MS].to_numpy())
    names, columns = [], []
    low, high = plan.calibration
    for task in tasks:
        observed = rows[f"label_{task}"].is_not_null().to_numpy()
        weight = rows[WEIGHT].cast(pl.Float64).to_numpy() * observed
        label = rows[f"label_{task}"].fill_null(0).cast(pl.Float64).to_numpy()
        p, q = (t[f"p_{task}"].to_numpy() for t in (rows, control))

        def per_user(values: np.ndarray, weight: np.ndarray = weight) -> np.ndarray:
            return np.bincount(place, weights=weight * values, minlength=users.size)

        shown = np.maximum(per_user(np.ones_like(p)), 1e-12)
        columns += [
            per_user(cross_entropy(label, p) - cross_entropy(label, q)) / shown,
            per_user(p - high * label),
            per_user(p - low * label),
        ]
        names += [f"{task}/loss", f"{task}/above", f"{task}/below"]
    order = np.lexsort((users, last))
    return names, np.stack(columns, axis=1)[order], last[order]


def _look(names: Sequence[str], values_UK: np.ndarray, time_ms: int, plan: CanaryPlan, users: int) -> Look:
    seen = len(values_UK)
    mean = values_UK.mean(axis=0)
    variance = values_UK.var(axis=0, ddof=1) if seen > 1 else np.full(mean.shape, np.inf)
    half = confidence_sequence(
        mean, variance, np.array(seen), alpha=plan.alpha / len(names), narrowest_at=max(1.0, users / 2)
    )
    statistics = {
        n: Interval(value=float(m), low=float(m - h), high=float(m + h))
        for n, m, h in zip(names, mean, half, strict=True)
    }
    if seen < FEWEST_USERS:
        few = f"{seen} users are too few to say anything; {FEWEST_USERS} are needed"
        return Look(users=seen, time_ms=time_ms, statistics=statistics, verdict="undecided", reasons=(few,))
    harms = _harms(statistics, plan)
    wide = [
        f"{name} may be as bad as {of.high:+.4f}, the margin is {plan.loss_margin:+.4f}"
        for name, of in statistics.items()
        if name.endswith("/loss") and not (of.high is not None and of.high < plan.loss_margin)
    ]
    verdict: Verdict = "harm" if harms else "undecided" if wide else "safe"
    fine = (f"no task loses more than {plan.loss_margin:g}, and no ratio is shown to leave its bounds",)
    reasons = tuple(harms or wide) or fine
    return Look(users=seen, time_ms=time_ms, statistics=statistics, verdict=verdict, reasons=reasons)


def _harms(statistics: dict[str, Interval], plan: CanaryPlan) -> list[str]:
    """What is shown to be out of bounds, in words."""
    low, high = plan.calibration
    harms = []
    for name, of in statistics.items():
        task, _, kind = name.rpartition("/")
        assert of.low is not None, "a mean has an interval"
        assert of.high is not None, "a mean has an interval"
        if kind == "loss" and of.low > plan.loss_margin:
            harms.append(f"{task}: log loss is worse by {of.value:+.4f} [{of.low:+.4f}, {of.high:+.4f}]")
        if kind == "above" and of.low > 0:
            harms.append(f"{task}: calibration ratio is above {high:g}")
        if kind == "below" and of.high < 0:
            harms.append(f"{task}: calibration ratio is below {low:g}")
    return harms
