"""The ladder of a wave: one step after the other, each trained or served anew, compared with the last that was kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from pipeline.evaluate.compare import compare
from pipeline.evaluate.predictions import Predictions
from pipeline.rollout import waves
from pipeline.rollout.driver.context import Context, wave_folder
from pipeline.rollout.driver.models import Built, export_all, score_all, train
from pipeline.rollout.measurements import Interval
from pipeline.rollout.quality import differences, interval
from pipeline.rollout.results import Differences, RungResult, WaveResult, judge_step
from pipeline.rollout.waves import SERVING_STEPS, Rung, Serving

# Steps without which the challenger would serve less than the champion does.
NEEDED = {"multi_task": "champions serve these tasks", "carried": "the wave before is what this one extends"}


class Ladder:
    """Climbs the steps of a wave; `current` is the model so far, `rungs` and `built` all that was tried.

    Args:
        context: of the wave.
        before: what the wave before came to.
        parent: key of the wave's tracker.
    """

    def __init__(self, context: Context, before: WaveResult, parent: str | None) -> None:
        self.context = context
        self.before = before
        self.parent = parent
        self.rungs: list[RungResult] = []
        self.built: list[Built] = []
        self._kept: Built | None = None

    @property
    def current(self) -> Built:
        """The last step that was kept."""
        assert self._kept is not None, "the first step is always kept"
        return self._kept

    def climb(self) -> None:
        """Take every step of the plan."""
        plan = self.context.plan
        for step in plan.wave(self.context.number).steps:
            made, unmeasured = self._build(step)
            found: Differences = {}
            if self._kept is None:
                kept, reason = True, "the start"
            elif unmeasured:
                kept, reason = True, unmeasured
            else:
                found = self._differences(made)
                kept, reason = judge_step(step, found, plan.thresholds)
                if step in NEEDED and not kept:
                    kept, reason = True, f"needed: {NEEDED[step]}; {reason}"
            self._record(step, made, kept, reason, found)
            if kept:
                self._kept = made

    def _build(self, step: str) -> tuple[Built, str]:
        """The model with one more step taken, and why it could not be measured, if so."""
        rung, warm = self._next(step)
        if self._kept is not None and step in SERVING_STEPS:
            return self._serve(step, rung, self.current.checkpoint), ""
        if step == "tf32" and self._kept is not None and not torch.cuda.is_available():
            return replace(self.current, rung=rung), "not measured: no effect on this machine's hardware"
        folder = self.context.folder / step
        context = self.context
        path = train(
            rung.config,
            context.data,
            folder,
            parent=self.parent,
            wave=context.number,
            warm=warm,
            console=context.console,
        )
        return self._serve(step, rung, path), ""

    def _next(self, step: str) -> tuple[Rung, Path | None]:
        """The rung that a step leads to, and the checkpoint that it starts from."""
        context = self.context
        surfaces = context.plan.wave(context.number).surfaces
        if step == "merged":
            return waves.merged(context.base, surfaces), None
        if step == "carried":
            last = self.before.last_rung
            return waves.carried(Rung(config=last.config, serving=last.serving), surfaces), None
        rung = waves.climb(self.current.rung, step, context.base)
        if step != "warm_start":
            return rung, None
        return rung, wave_folder(context.out, context.number - 1) / self.before.last_rung.checkpoint

    def _serve(self, step: str, rung: Rung, checkpoint: Path) -> Built:
        """Artifacts and scores; what another step has already made of the same checkpoint is taken from there."""
        days, dataset = self.context.plan.evaluation_days, self.context.dataset
        for other in self.built:
            same = other.checkpoint == checkpoint and _program(other.rung.serving) == _program(rung.serving)
            if same:
                return replace(other, rung=rung)
        folder = self.context.folder / step / "artifacts"
        artifacts = export_all(
            checkpoint,
            rung.config.surfaces,
            rung.serving,
            folder,
            dataset,
            days=days,
            unique_users=self.context.plan.thresholds.unique_users,
        )
        scored = score_all(artifacts, dataset, days)
        return Built(rung=rung, checkpoint=checkpoint, artifacts=artifacts, scored=scored)

    def _differences(self, made: Built) -> Differences:
        runs = {"before": self.current.predictions, "after": made.predictions}
        return differences(runs, reference="before", resamples=self.context.resamples)

    def _record(self, step: str, made: Built, kept: bool, reason: str, found: Differences) -> None:
        context = self.context
        auc = _auc(made.predictions, resamples=context.resamples)
        self.built.append(made)
        self.rungs.append(
            RungResult(
                step=step,
                kept=kept,
                reason=reason,
                config=made.rung.config,
                serving=made.rung.serving,
                checkpoint=str(made.checkpoint.relative_to(context.folder)),
                artifacts={s: str(p.relative_to(context.folder)) for s, p in made.artifacts.items()},
                auc=auc,
                differences=found,
            )
        )
        task = made.rung.config.tasks[0]
        shown = "  ".join(f"{s} {of[task].value:.4f}" for s, of in auc.items() if of[task].value is not None)
        context.console.print(
            f"  {step}: {'kept' if kept else 'dropped'} ({reason}); {task} AUC {shown}", soft_wrap=True
        )


def _program(serving: Serving) -> Serving:
    """What of serving is in the artifact: all but how requests are sent."""
    return replace(serving, broadcast=True)


def _auc(predictions: Predictions, *, resamples: int) -> dict[str, dict[str, Interval]]:
    found = compare({"step": predictions}, resamples=resamples).scores["step"]
    return {s: {t: interval(of["auc"]) for t, of in tasks.items()} for s, tasks in found.items()}
