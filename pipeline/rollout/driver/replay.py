"""The canary on a later day's logs: both models score them side by side; a candidate that does harm is taken back."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, TypeAdapter, with_config
from rich.console import Console

from pipeline.config import default_home
from pipeline.errors import RegistryError
from pipeline.evaluate.compare import compare
from pipeline.rollout.canary import CANDIDATE, CONTROL, CanaryResult, watch
from pipeline.rollout.driver.context import Context
from pipeline.rollout.driver.publication import EXPERIMENT, artifact_of, keep_change
from pipeline.rollout.faults import Fault
from pipeline.rollout.quality import interval, score_days
from pipeline.rollout.registry import CHALLENGER, CHAMPION, PREVIOUS, Registry, Version
from pipeline.rollout.results import Differences
from pipeline.serve.scorer import Scorer
from pipeline.tracking import Tracker

Action = Literal["rolled back", "withdrawn", "none"]
ACTOR = "canary"


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, kw_only=True)
class ReplayResult:
    """What the replay of one surface came to.

    Args:
        surface: which.
        candidate, control: their versions.
        candidate_alias: what the candidate was when the replay began.
        days: replayed.
        fault: planted in the candidate's requests; empty if none was.
        differences: candidate less control over all users, paired.
        canary: what the watch over the candidate's share found.
        action: what was done to the candidate.
        seconds: that the action took.
    """

    surface: str
    candidate: int
    control: int
    candidate_alias: str
    days: tuple[str, ...]
    fault: str
    differences: Differences
    canary: CanaryResult
    action: Action
    seconds: float


REPLAY_RESULT = TypeAdapter(ReplayResult)


def replay(context: Context, surface: str, *, fault: Fault | None = None) -> ReplayResult:
    """Replay the plan's later days for one surface, and act on what is found.

    A challenger is watched beside the champion, and withdrawn where it does harm. Where there is none, the champion is
    watched beside the version that served before it, and rolled back.

    Args:
        context: plan, log and folder of the rollout.
        surface: which.
        fault: to plant in the candidate's requests.

    Raises:
        RegistryError: there are no two versions to compare, or the registry fails; nothing was changed.
    """
    registry = Registry(default_home())
    alias, candidate, control = _pair(registry, surface)
    days, tasks = context.plan.replay_days, context.base.tasks
    scorers = [Scorer.open(artifact_of(v, context.out)) for v in (candidate, control)]
    alter = None if fault is None else lambda rows: fault.apply(rows, context.dataset.schema)
    new = score_days(scorers[0], context.dataset, days, alter=alter)
    new = new if fault is None else fault.distort(new)
    old = score_days(scorers[1], context.dataset, days)
    both = tuple(t for t in tasks if t in new.tasks and t in old.tasks)
    found = watch(new, old, context.plan.canary, both)
    compared = compare({CONTROL: old, CANDIDATE: new}, resamples=context.resamples).differences[CANDIDATE]
    action, seconds = _act(registry, surface, alias, found)
    result = ReplayResult(
        surface=surface,
        candidate=candidate.version,
        control=control.version,
        candidate_alias=alias,
        days=days,
        fault=str(fault or ""),
        differences={
            s: {t: {m: interval(of[m]) for m in ("auc", "ne")} for t, of in by_task.items()}
            for s, by_task in compared.items()
        },
        canary=found,
        action=action,
        seconds=seconds,
    )
    _keep(context, result)
    return result


def _pair(registry: Registry, surface: str) -> tuple[str, Version, Version]:
    """Alias and version of the candidate, and the version that it is held against."""
    champion = registry.get(surface, CHAMPION)
    if champion is None:
        raise RegistryError(f"surface {surface!r} has no champion; there is nothing to replay against")
    challenger = registry.get(surface, CHALLENGER)
    if challenger is not None:
        return CHALLENGER, challenger, champion
    previous = registry.get(surface, PREVIOUS)
    if previous is None:
        raise RegistryError(
            f"surface {surface!r} has neither a challenger nor a previous version to replay its champion against"
        )
    return CHAMPION, champion, previous


def _act(registry: Registry, surface: str, alias: str, found: CanaryResult) -> tuple[Action, float]:
    if found.verdict != "harm":
        return "none", 0.0
    start = time.perf_counter()
    reason = f"after {found.looks[-1].users} users: {'; '.join(found.reasons)}"
    if alias == CHAMPION:
        registry.rollback(surface, actor=ACTOR, reason=reason)
    else:
        registry.withdraw(surface, actor=ACTOR, reason=reason)
    seconds = time.perf_counter() - start
    keep_change(registry.history(surface)[-1])
    return ("rolled back" if alias == CHAMPION else "withdrawn"), seconds


def _keep(context: Context, result: ReplayResult) -> None:
    """The replay as a run in MLflow, every look a step, and as a file in the rollout's folder."""
    folder: Path = context.out / "replays" / f"{result.surface}-{result.candidate}-{time.time_ns()}"
    folder.mkdir(parents=True)
    path = folder / "replay.json"
    path.write_bytes(REPLAY_RESULT.dump_json(result, indent=1))
    tracker = Tracker.start(
        f"replay-{result.surface}",
        run_dir=folder,
        root=default_home(),
        experiment=EXPERIMENT,
        tags={
            "kind": "replay",
            "surface": result.surface,
            "verdict": result.canary.verdict,
            "action": result.action,
            "fault": result.fault or "none",
            "plan": context.plan.digest,
            "dataset": context.plan.dataset,
        },
        rank=0,
    )
    with tracker:
        for look in result.canary.looks:
            values = {
                f"canary/{name}/{end}": value
                for name, of in look.statistics.items()
                for end, value in (("mean", of.value), ("low", of.low), ("high", of.high))
                if value is not None and abs(value) < float("inf")
            }
            tracker.log_metrics(values, step=look.users)
        tracker.log_artifact(path)


def tell_replay(result: ReplayResult, console: Console) -> None:
    """Print a replay for a person."""
    canary = result.canary
    fault = f", planted: {result.fault}" if result.fault else ""
    console.print(
        f"{result.surface}: {result.candidate_alias} version {result.candidate} beside version {result.control} on "
        f"{', '.join(result.days)}, {canary.users:,} users in its share{fault}",
        soft_wrap=True,
    )
    for task, of in result.differences.get(result.surface, {}).items():
        auc, ne = of["auc"], of["ne"]
        if auc.value is None or ne.value is None or auc.low is None or ne.low is None:
            continue
        console.print(
            f"  {task}: AUC {auc.value:+.4f} [{auc.low:+.4f}, {auc.high:+.4f}], NE {ne.value:+.4f} "
            f"[{ne.low:+.4f}, {ne.high:+.4f}]"
        )
    colour = {"harm": "red", "safe": "green", "undecided": "yellow"}[canary.verdict]
    seen = canary.looks[-1].users
    console.print(
        f"  {canary.verdict} after {seen:,} of {canary.users:,} users: {'; '.join(canary.reasons)}",
        style=colour,
        soft_wrap=True,
    )
    if result.action != "none":
        console.print(f"  {result.action} in {result.seconds:.2f} s", style="red")
