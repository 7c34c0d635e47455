"""The plan of a rollout: a small YAML file that people read, edit and review, and that machines hold to.

It says which surfaces join the unified model in which wave and why, what that is predicted to cost, what each wave
measures step by step, and every threshold that a gate or the canary decides by. Nothing that decides has a default
elsewhere: `read_plan` refuses a plan that lacks a field.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from pipeline.errors import ConfigError, unknown
from pipeline.texts import parse_yaml

FORMAT_VERSION = 1

# What a step of a wave changes, in the order of the ladder. Steps that only change serving need no training.
STEPS: dict[str, str] = {
    "merged": "plain merged baseline: union of features, one trunk, one tower, one task, mixed data",
    "projection": "DCNv2 layers project the history's wide output to a smaller width",
    "broadcast": "request-level broadcasting: what belongs to the request is computed once, not once a candidate",
    "int8": "quantised embeddings: int8 rows in place of fp32",
    "compiled": "fused kernels: the program compiled ahead of time (AOTInductor)",
    "tf32": "TF32 matrix products; measured where the hardware has them",
    "towers": "a tower tree for each surface, with late fusion of what only it has",
    "multi_task": "MMoE with gates per surface and task, a head for each task",
    "calibration": "calibration per surface and task in place of one for all",
    "carried": "all that the wave before kept, on this wave's surfaces, from first weights",
    "warm_start": "the same, started from the weights of the wave before",
}
_FIRST = ("merged", "carried")


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, kw_only=True)
class SurfacePlan:
    """A surface's requests and measured costs.

    Args:
        candidates: mean number of candidates of a request, in the log.
        history: mean number of history events of a request, in the log.
        separate_ms: cost of its separate model, see `costs.MEASURE`.
        unified_ms: cost of the whole unified model pruned to this surface.
        separate_p99_ms: 99th percentile of a batch's latency, separate model.
    """

    candidates: int
    history: int
    separate_ms: float
    unified_ms: float
    separate_p99_ms: float


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, kw_only=True)
class Wave:
    """One wave.

    Args:
        surfaces: of the unified model after it; all surfaces of the wave before, and more.
        steps: names of `STEPS`, in order; the ladder.
        predicted_ms: cost of every surface after the wave; for readers, nothing decides by it.
        why: one sentence; for readers.
    """

    surfaces: tuple[str, ...]
    steps: tuple[str, ...]
    predicted_ms: dict[str, float]
    why: str


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What the gates decide by.

    Args:
        auc_margin: non-inferiority: the interval of the AUC difference to the champion must lie above -margin.
        ne_margin: the interval of the NE difference must lie below +margin.
        calibration: overall, sum of probabilities over sum of labels must lie in [low, high].
        slice_calibration: the interval of a slice's ratio must reach into [low, high].
        slice_positives: a slice with fewer positives is shown, not judged.
        cost_growth: the cost on a surface, over that of its separate model, measured side by side, at most this.
        cost_gain: a cost at most this share of the champion's counts as better; far enough below 1 that noise does not.
        p99_ms: surface -> the most milliseconds of a batch at the 99th percentile.
        unique_users: the fewest unique users that one run of the program must be able to take.
        coverage_drop: the most that the share of present values of a feature may fall from training to evaluation.
        drift: the most that a feature's population stability index may be; 0.25 is the customary alarm.
        drift_ignored: features whose distribution moves by design, such as ages and ids of new ads.
    """

    auc_margin: float
    ne_margin: float
    calibration: tuple[float, float]
    slice_calibration: tuple[float, float]
    slice_positives: int
    cost_growth: float
    cost_gain: float
    p99_ms: dict[str, float]
    unique_users: int
    coverage_drop: float
    drift: float
    drift_ignored: tuple[str, ...]


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, kw_only=True)
class CanaryPlan:
    """How a candidate is watched after its gates.

    Args:
        share: of users whose requests the candidate serves, in (0, 1].
        salt: of the hash that chooses them; another salt chooses others.
        looks: how often the statistics are looked at.
        alpha: chance of stopping a candidate that does no harm, over all looks, tasks and metrics of a surface.
        loss_margin: harm in mean log loss of a user (nats) that must be left out of the confidence sequence's reach.
        calibration: [low, high] that the ratio must not be shown to leave.
    """

    share: float
    salt: str
    looks: int
    alpha: float
    loss_margin: float
    calibration: tuple[float, float]


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, kw_only=True)
class RolloutPlan:
    """The plan, whole.

    Args:
        format_version: of this file.
        recipe: of the unified model; the waves' runs are derived from it.
        dataset: fingerprint of the log that costs were measured on and that evidence must come from.
        evaluation_days: the gates judge on these; training ends before them.
        replay_days: the canary replays these, which lie after the evaluation days.
        measure: what a cost is; for readers.
        matched_within: greatest ratio of costs that match.
        staging: what the costs say about staging; for readers.
        surfaces: by name.
        waves: in order.
        thresholds: of the gates.
        canary: of the replay.
    """

    format_version: Literal[1]
    recipe: str
    dataset: str
    evaluation_days: tuple[str, ...]
    replay_days: tuple[str, ...]
    measure: str
    matched_within: float
    staging: str
    surfaces: dict[str, SurfacePlan]
    waves: tuple[Wave, ...]
    thresholds: Thresholds
    canary: CanaryPlan

    def __post_init__(self) -> None:
        problems = [*_wave_problems(self), *_threshold_problems(self), *_canary_problems(self.canary)]
        if not self.evaluation_days:
            problems.append("evaluation_days is empty; the gates need at least one day")
        if self.evaluation_days and self.replay_days and min(self.replay_days) <= max(self.evaluation_days):
            problems.append(
                f"replay_days begin on {min(self.replay_days)}, not after the last of evaluation_days, "
                f"{max(self.evaluation_days)}; the canary must see later days than the gates"
            )
        if problems:
            raise ConfigError("the plan contradicts itself:\n  - " + "\n  - ".join(problems))

    def wave(self, number: int) -> Wave:
        """The wave of that number, counting from 1.

        Raises:
            ConfigError: there is none.
        """
        if not 1 <= number <= len(self.waves):
            raise ConfigError(f"the plan has waves 1 to {len(self.waves)}, and 0 for the separate models; not {number}")
        return self.waves[number - 1]

    @property
    def digest(self) -> str:
        """SHA-256 of everything in the plan that decides: all but the fields for readers."""
        content = _PLAN.dump_python(self, mode="json")
        for name in ("measure", "staging"):
            del content[name]
        for wave in content["waves"]:
            del wave["why"], wave["predicted_ms"]
        text = yaml.safe_dump(content, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


_PLAN = TypeAdapter(RolloutPlan)


def _wave_problems(plan: RolloutPlan) -> list[str]:
    problems = [] if plan.waves else ["waves is empty; a rollout has at least one"]
    before: tuple[str, ...] = ()
    for i, wave in enumerate(plan.waves):
        where = f"waves[{i}]"
        for surface in wave.surfaces:
            if surface not in plan.surfaces:
                problems.append(f"{where}.surfaces: " + unknown("surface", surface, plan.surfaces))
        if len(set(wave.surfaces)) < len(wave.surfaces):
            problems.append(f"{where}.surfaces names a surface twice")
        if lost := [s for s in before if s not in wave.surfaces]:
            problems.append(f"{where}.surfaces lacks {', '.join(lost)} of the wave before; a wave only adds surfaces")
        elif i and set(before) == set(wave.surfaces):
            problems.append(f"{where}.surfaces adds none to the wave before; join the two")
        problems += [f"{where}.steps: " + unknown("step", s, STEPS) for s in wave.steps if s not in STEPS]
        if not wave.steps or wave.steps[0] not in _FIRST:
            problems.append(f"{where}.steps must begin with {' or '.join(_FIRST)}: the rest are changes to it")
        if i == 0 and (needs := [s for s in wave.steps if s in ("carried", "warm_start")]):
            problems.append(f"{where}.steps names {', '.join(needs)}, and there is no wave before it")
        if "warm_start" in wave.steps and wave.steps[-1] != "warm_start":
            problems.append(f"{where}.steps: warm_start must stand last: other steps change the model it starts")
        if len(set(wave.steps)) < len(wave.steps):
            problems.append(f"{where}.steps names a step twice")
        before = wave.surfaces
    return problems


def _threshold_problems(plan: RolloutPlan) -> list[str]:
    limits = plan.thresholds
    problems = [
        f"thresholds.{name} is {getattr(limits, name)}; it must not be negative"
        for name in ("auc_margin", "ne_margin", "slice_positives", "coverage_drop", "drift")
        if not getattr(limits, name) >= 0
    ]
    problems += _range_problems("thresholds.calibration", limits.calibration)
    problems += _range_problems("thresholds.slice_calibration", limits.slice_calibration)
    if not limits.cost_growth > 0:
        problems.append(f"thresholds.cost_growth is {limits.cost_growth}; it is a ratio of costs and must be positive")
    if not 0 < limits.cost_gain < 1:
        problems.append(f"thresholds.cost_gain is {limits.cost_gain}; it must lie between 0 and 1, such as 0.9")
    if limits.unique_users < 1:
        problems.append(f"thresholds.unique_users is {limits.unique_users}; it must be at least 1")
    for surface in limits.p99_ms:
        if surface not in plan.surfaces:
            problems.append("thresholds.p99_ms: " + unknown("surface", surface, plan.surfaces))
    problems += [f"thresholds.p99_ms lacks surface {s!r}" for s in plan.surfaces if s not in limits.p99_ms]
    return problems


def _canary_problems(canary: CanaryPlan) -> list[str]:
    problems = _range_problems("canary.calibration", canary.calibration)
    if not 0 < canary.share <= 1:
        problems.append(f"canary.share is {canary.share}; it must lie in (0, 1]")
    if not 0 < canary.alpha < 1:
        problems.append(f"canary.alpha is {canary.alpha}; it must lie between 0 and 1")
    if canary.looks < 1:
        problems.append(f"canary.looks is {canary.looks}; it must be at least 1")
    if not canary.loss_margin >= 0:
        problems.append(f"canary.loss_margin is {canary.loss_margin}; it must not be negative")
    return problems


def _range_problems(name: str, bounds: tuple[float, float]) -> list[str]:
    low, high = bounds
    if 0 < low <= 1 <= high:
        return []
    return [f"{name} is [{low:g}, {high:g}]; it must be [low, high] with 0 < low <= 1 <= high"]


_HEADER = """\
# Made by `trefoil rollout plan`. Read it, change it, have it reviewed: `trefoil rollout run` holds to it.
# {staging}
"""


def write_plan(path: Path, plan: RolloutPlan) -> None:
    """Write a plan as YAML.

    Raises:
        ConfigError: the file is already there.
    """
    if path.exists():
        raise ConfigError(f"{path} already exists; a reviewed plan is not written over, give another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(plan_text(plan), encoding="utf-8")


def plan_text(plan: RolloutPlan) -> str:
    """The plan as it stands in its file."""
    content = _PLAN.dump_python(plan, mode="json")
    header = _HEADER.format(staging=plan.staging)
    return header + yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=120)


class _Dumper(yaml.SafeDumper):
    """Short lists of plain values on one line, as people write them."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        plain = all(isinstance(v, str | int | float) for v in sequence)
        return super().represent_sequence(tag, sequence, flow_style=plain or flow_style)


def read_plan(path: Path) -> RolloutPlan:
    """Read and check a plan.

    Raises:
        ConfigError: there is no such file, it is no YAML, lacks a field or has one too many, or contradicts itself;
            every problem is named with its place.
    """
    if not path.is_file():
        raise ConfigError(f"there is no plan {path}; make one with `trefoil rollout plan --out {path}`")
    try:
        content = parse_yaml(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is no plan: it must hold fields such as `waves`, and holds {content!r:.60}")
    _dates_as_text(content)
    try:
        return _PLAN.validate_python(content)
    except ValidationError as error:
        lines = [_problem(e) for e in error.errors()]
        raise ConfigError(f"{path} is no plan:\n  - " + "\n  - ".join(lines)) from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _dates_as_text(content: dict[str, Any]) -> None:
    """YAML reads an unquoted 2026-01-10 as a date; days are text everywhere else."""
    for name in ("evaluation_days", "replay_days"):
        if isinstance(content.get(name), list):
            content[name] = [str(day) for day in content[name]]


def _problem(error: Any) -> str:
    place = ".".join(str(part) for part in error["loc"]) or "file"
    if error["type"] == "unexpected_keyword_argument":
        known = _fields_of(error["loc"][:-1])
        return f"{place}: " + unknown("field", str(error["loc"][-1]), known)
    if error["type"] == "missing":
        return f"{place} is missing; a plan says everything that decides"
    return f"{place}: {error['msg']}, and is {error['input']!r:.60}"


def _fields_of(place: tuple[int | str, ...]) -> list[str]:
    owners: dict[str, Any] = {
        "surfaces": SurfacePlan,
        "waves": Wave,
        "thresholds": Thresholds,
        "canary": CanaryPlan,
    }
    owner: Any = owners.get(str(place[0]), RolloutPlan) if place else RolloutPlan
    return [f.name for f in fields(owner)]
