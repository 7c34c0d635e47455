"""What a wave came to: its ladder, measurements and decisions, as one JSON file that the report is made from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from pipeline.config import RunConfig
from pipeline.errors import ConfigError
from pipeline.rollout.gates import Decision
from pipeline.rollout.measurements import CostMeasurements, Interval, SurfaceMeasurements
from pipeline.rollout.plan import RolloutPlan, Thresholds
from pipeline.rollout.waves import EFFICIENCY_STEPS, Serving

RESULT = "result.json"
Differences = dict[str, dict[str, dict[str, Interval]]]
_STRICT = ConfigDict(extra="forbid")


@with_config(_STRICT)
@dataclass(frozen=True, kw_only=True)
class RungResult:
    """One step of a wave's ladder.

    Args:
        step: its name.
        kept: whether later steps build on it.
        reason: why, or why it was not measured.
        config: of the run.
        serving: how it is served.
        checkpoint: folder, relative to the wave's.
        artifacts: surface -> folder, relative to the wave's.
        auc: surface -> task -> AUC on the evaluation days.
        differences: surface -> task -> metric -> difference to the last step that was kept; empty for the first.
        cost: surface -> of its artifact.
    """

    step: str
    kept: bool
    reason: str
    config: RunConfig
    serving: Serving
    checkpoint: str
    artifacts: dict[str, str]
    auc: dict[str, dict[str, Interval]]
    differences: Differences
    cost: dict[str, CostMeasurements] = field(default_factory=dict)


@with_config(_STRICT)
@dataclass(frozen=True, kw_only=True)
class Curve:
    """A reliability curve: score deciles from low to high.

    Args:
        mean_p: mean predicted probability.
        mean_label: observed rate.
        low, high: ends of the rate's 95 % interval over rows (Wilson).
    """

    mean_p: list[float]
    mean_label: list[float]
    low: list[float]
    high: list[float]


@with_config(_STRICT)
@dataclass(frozen=True, kw_only=True)
class WaveResult:
    """One wave, whole.

    Args:
        wave: its number; 0 for the separate models.
        plan: digest of the plan.
        dataset: fingerprint of the log.
        evaluation_days: that everything was measured on.
        code: version of the code.
        run: MLflow's run of the wave, or the run's key where MLflow has not answered yet.
        rungs: the ladder; empty for wave 0.
        measurements: by surface.
        decisions: by surface.
        champions: surface -> version that it was compared with; None where nothing served.
        champion_auc: surface -> task -> of what it was compared with.
        versions: surface -> registered version, of surfaces that passed.
        artifacts: surface -> folder of the challenger, relative to the wave's.
        separate_cost, champion_cost: surface -> of these models, timed beside the challenger.
        curves: surface -> task -> model -> reliability curve.
    """

    wave: int
    plan: str
    dataset: str
    evaluation_days: tuple[str, ...]
    code: str
    run: str
    rungs: tuple[RungResult, ...]
    measurements: dict[str, SurfaceMeasurements]
    decisions: dict[str, Decision]
    champions: dict[str, int | None]
    champion_auc: dict[str, dict[str, Interval]]
    versions: dict[str, int]
    artifacts: dict[str, str]
    separate_cost: dict[str, CostMeasurements]
    champion_cost: dict[str, CostMeasurements]
    curves: dict[str, dict[str, dict[str, Curve]]]

    @property
    def last_rung(self) -> RungResult:
        """The last step that was kept: the challenger."""
        return [rung for rung in self.rungs if rung.kept][-1]


WAVE_RESULT = TypeAdapter(WaveResult)


def read_result(folder: Path, plan: RolloutPlan) -> WaveResult | None:
    """The result in a wave's folder; None if the wave has not ended.

    Raises:
        ConfigError: it is of another plan or log, or damaged.
    """
    path = folder / RESULT
    if not path.is_file():
        return None
    try:
        result = WAVE_RESULT.validate_json(path.read_bytes())
    except ValidationError as error:
        problem = error.errors()[0]
        raise ConfigError(f"{path} is damaged: {problem['loc']}: {problem['msg']}; remove it, run the wave") from error
    if (result.plan, result.dataset) != (plan.digest, plan.dataset):
        raise ConfigError(f"{path} is of another plan; give another --out, or remove the folder to start anew")
    return result


def judge_step(step: str, differences: Differences, thresholds: Thresholds) -> tuple[bool, str]:
    """Whether a step of the ladder is kept, and why.

    A step is dropped when some surface's first task is worse beyond users' luck: the interval of its AUC or NE
    difference leaves out zero or, for steps that aim at cost, the margins of the gates.
    """
    slack = step in EFFICIENCY_STEPS
    auc_margin, ne_margin = (thresholds.auc_margin, thresholds.ne_margin) if slack else (0.0, 0.0)
    worse, better = [], []
    for surface, tasks in sorted(differences.items()):
        task, of = next(iter(tasks.items()))
        for metric, sign, margin in (("auc", 1.0, auc_margin), ("ne", -1.0, ne_margin)):
            d = of[metric]
            if d.value is None or d.low is None or d.high is None:
                continue
            ends = sorted((sign * d.low, sign * d.high))
            text = f"{surface} {task} {metric.upper()} {d.value:+.4f} [{d.low:+.4f}, {d.high:+.4f}]"
            if ends[1] < -margin:
                worse.append(text)
            if ends[0] > 0:
                better.append(text)
    if worse:
        return False, f"worse: {'; '.join(worse)}"
    return True, f"better: {'; '.join(better)}" if better else "no difference beyond users' luck"


def may_start(number: int, before: WaveResult | None) -> list[str]:
    """Why a wave may not start, one reason a line; empty if it may.

    The separate models (wave 0) must be there for wave 1; of later waves, the wave before must have run and every
    surface of it must be inside its cost envelope.
    """
    if number == 0:
        return []
    if before is None:
        return [f"wave {number - 1} has not run: `trefoil rollout run --wave {number - 1}`"]
    return [
        f"{surface} is outside its envelope in wave {number - 1}: {verdict.gate} {verdict.reason}"
        for surface, decision in sorted(before.decisions.items())
        for verdict in decision.failures
        if verdict.gate in ("cost", "p99")
    ]
