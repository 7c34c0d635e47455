"""From measurements to a decision, with reasons. Pure: no clock, no file, no chance, no order.

A challenger passes when every gate passes:

| gate | per | passes when |
|---|---|---|
| auc, ne | task | not inferior: the paired interval of the difference to the champion clears the margin |
| calibration | task | the overall ratio lies within its bounds |
| calibration by slice | task, slice | the interval of the ratio reaches into its bounds |
| gain | surface | something is better than the champion: a task's AUC or NE, or clearly the cost |
| cost, p99 | surface | within the surface's envelope |
| parity, unique users | surface | the artifact gives the trainer's scores; one run takes enough users |
| coverage, drift | feature | evaluation days look like training days |

All gates must hold at once, so no correction for their number is due: the chance to pass a challenger that one of
them should stop is at most that of this gate alone (intersection-union test; Berger, "Multiparameter Hypothesis
Testing and Acceptance Sampling", 1982). Non-inferiority by a confidence interval that clears the margin: Piaggio et
al., "Reporting of Noninferiority and Equivalence Randomized Trials", 2012.

A surface's decision is a function of that surface's measurements alone, so one that fails changes no other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from pydantic import ConfigDict, TypeAdapter, with_config

from pipeline.rollout.measurements import Interval, SurfaceMeasurements, TaskMeasurements
from pipeline.rollout.plan import Thresholds

# Every kind of slice must be there, or its gate fails.
SLICES = ("decile", "users", "ads", "day")


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one gate says.

    Args:
        gate: its name, such as `auc`.
        subject: what it looked at: a task, a slice, a feature; empty for the surface as a whole.
        passed: whether it lets the challenger through.
        reason: measurement and bound, in words.
    """

    gate: str
    subject: str
    passed: bool
    reason: str

    def __str__(self) -> str:
        return f"{self.gate} {self.subject}".rstrip() + f": {self.reason}"


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, kw_only=True)
class Decision:
    """What the gates say of one surface's challenger.

    Args:
        surface: which.
        passed: whether every gate passed.
        verdicts: one a gate and subject.
    """

    surface: str
    passed: bool
    verdicts: tuple[Verdict, ...]

    @property
    def failures(self) -> tuple[Verdict, ...]:
        """Verdicts of the gates that did not pass."""
        return tuple(v for v in self.verdicts if not v.passed)


DECISION = TypeAdapter(Decision)


def decide(measured: SurfaceMeasurements, thresholds: Thresholds, tasks: Sequence[str]) -> Decision:
    """The decision on one surface's challenger.

    Args:
        measured: of this surface.
        thresholds: of the plan.
        tasks: that the model must serve; one without measurements fails its gates.
    """
    verdicts: list[Verdict] = []
    for task in sorted(tasks):
        verdicts += _task(task, measured.tasks.get(task, TaskMeasurements()), thresholds)
    verdicts.append(_gain(measured, thresholds, sorted(tasks)))
    verdicts += _serving(measured, thresholds)
    verdicts += _features(measured, thresholds)
    return Decision(surface=measured.surface, passed=all(v.passed for v in verdicts), verdicts=tuple(verdicts))


def decide_all(
    measured: Mapping[str, SurfaceMeasurements], thresholds: Thresholds, tasks: Sequence[str]
) -> dict[str, Decision]:
    """The decision on each surface, each from its own measurements alone."""
    return {surface: decide(of, thresholds, tasks) for surface, of in measured.items()}


def _task(task: str, of: TaskMeasurements, thresholds: Thresholds) -> Iterator[Verdict]:
    yield _non_inferior("auc", task, of.auc_difference, thresholds.auc_margin, higher_is_better=True)
    yield _non_inferior("ne", task, of.ne_difference, thresholds.ne_margin, higher_is_better=False)
    low, high = thresholds.calibration
    ratio = None if of.calibration is None else of.calibration.value
    if not _known(ratio):
        yield _missing("calibration", task)
    else:
        yield Verdict(
            gate="calibration",
            subject=task,
            passed=low <= ratio <= high,
            reason=f"ratio {ratio:.3f}, must lie in [{low:g}, {high:g}]",
        )
    yield from _slices(task, of, thresholds)


def _non_inferior(
    gate: str, task: str, difference: Interval | None, margin: float, *, higher_is_better: bool
) -> Verdict:
    if difference is None or not all(_known(v) for v in (difference.value, difference.low, difference.high)):
        return _missing(gate, task)
    assert difference.low is not None, "known"
    assert difference.high is not None, "known"
    passed = difference.low > -margin if higher_is_better else difference.high < margin
    bound = f"the interval must lie above {-margin:+g}" if higher_is_better else f"must lie below {margin:+g}"
    return Verdict(
        gate=gate,
        subject=task,
        passed=passed,
        reason=f"difference {difference.value:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}], {bound}",
    )


def _slices(task: str, of: TaskMeasurements, thresholds: Thresholds) -> Iterator[Verdict]:
    """One verdict a kind of slice; its reason names the slices that are off."""
    low, high = thresholds.slice_calibration
    for kind in SLICES:
        gate, slices = f"calibration by {kind}", (of.slices or {}).get(kind)
        if not slices:
            yield _missing(gate, task)
            continue
        judged, off, unmeasured = 0, [], []
        for name, part in sorted(slices.items()):
            if part.positives < thresholds.slice_positives:
                continue
            judged += 1
            ratio = part.calibration
            if ratio is None or not all(_known(v) for v in (ratio.value, ratio.low, ratio.high)):
                unmeasured.append(name)
            elif ratio.low is not None and ratio.high is not None and (ratio.low > high or ratio.high < low):
                off.append(f"{name} {ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]")
        few = len(slices) - judged
        reason = f"{judged} judged" + (f", {few} with fewer than {thresholds.slice_positives} positives" if few else "")
        if off:
            reason = f"outside [{low:g}, {high:g}]: {', '.join(off)}"
        if unmeasured:
            reason = f"not measured: {', '.join(unmeasured)}"
        yield Verdict(gate=gate, subject=task, passed=not off and not unmeasured, reason=reason)


def _gain(measured: SurfaceMeasurements, thresholds: Thresholds, tasks: Sequence[str]) -> Verdict:
    """Inside every margin and yet better in nothing is no reason to change what serves."""
    better = []
    for task in tasks:
        of = measured.tasks.get(task, TaskMeasurements())
        auc = None if of.auc_difference is None else of.auc_difference.value
        ne = None if of.ne_difference is None else of.ne_difference.value
        if _known(auc) and auc > 0:
            better.append(f"{task} AUC {auc:+.4f}")
        if _known(ne) and ne < 0:
            better.append(f"{task} NE {ne:+.4f}")
    cost = measured.cost.over_champion
    if _known(cost) and 0 < cost <= thresholds.cost_gain:
        better.append(f"cost x{cost:.2f}")
    reason = f"better: {', '.join(better)}" if better else "nothing measured is better than the champion"
    return Verdict(gate="gain", subject="", passed=bool(better), reason=reason)


def _serving(measured: SurfaceMeasurements, thresholds: Thresholds) -> Iterator[Verdict]:
    cost, limit = measured.cost, thresholds.p99_ms.get(measured.surface)
    if not _known(cost.over_separate) or cost.over_separate <= 0:
        yield _missing("cost", "")
    else:
        yield Verdict(
            gate="cost",
            subject="",
            passed=cost.over_separate <= thresholds.cost_growth,
            reason=f"{cost.over_separate:.2f} times the separate model's, at most {thresholds.cost_growth:g}",
        )
    if not _known(cost.p99_ms) or cost.p99_ms <= 0 or limit is None:
        yield _missing("p99", "")
    else:
        passed = cost.p99_ms <= limit
        yield Verdict(gate="p99", subject="", passed=passed, reason=f"{cost.p99_ms:.1f} ms a batch, at most {limit:g}")
    if not _known(measured.parity) or measured.parity < 0:
        yield _missing("parity", "")
    else:
        reason = f"{measured.parity:.2f} of the allowed difference to the trainer"
        yield Verdict(gate="parity", subject="", passed=measured.parity <= 1, reason=reason)
    if measured.unique_users is None:
        yield _missing("unique users", "")
    else:
        yield Verdict(
            gate="unique users",
            subject="",
            passed=measured.unique_users >= thresholds.unique_users,
            reason=f"one run takes {measured.unique_users}, at least {thresholds.unique_users} are needed",
        )


def _features(measured: SurfaceMeasurements, thresholds: Thresholds) -> Iterator[Verdict]:
    """One verdict on all features' coverage and one on their drift; the reasons name those that are off."""
    if not measured.features:
        yield _missing("coverage", "")
        yield _missing("drift", "")
        return
    lost, moved, unmeasured = [], [], []
    for name, of in sorted(measured.features.items()):
        if not _known(of.coverage_training) or not _known(of.coverage_evaluation):
            unmeasured.append(name)
        elif of.coverage_training - of.coverage_evaluation > thresholds.coverage_drop:
            lost.append(f"{name} {of.coverage_training:.1%} to {of.coverage_evaluation:.1%}")
        if name in thresholds.drift_ignored:
            continue
        if not _known(of.drift):
            unmeasured.append(name)
        elif of.drift > thresholds.drift:
            moved.append(f"{name} {of.drift:.2f}")
    count = len(measured.features)
    for gate, off, fine in (
        ("coverage", lost, f"no feature of {count} lost more than {thresholds.coverage_drop:.1%}"),
        ("drift", moved, f"no feature of {count} moved by more than {thresholds.drift:g}"),
    ):
        reason = f"past the bound: {', '.join(off)}" if off else fine
        if unmeasured:
            reason = f"not measured: {', '.join(sorted(set(unmeasured)))}"
        yield Verdict(gate=gate, subject="", passed=not off and not unmeasured, reason=reason)


def _missing(gate: str, subject: str) -> Verdict:
    return Verdict(gate=gate, subject=subject, passed=False, reason="not measured")


def _known(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)
