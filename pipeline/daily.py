"""Continuous training: day after day from the last checkpoint, each day scored before it is trained on.

The score of a day that the model has not seen is its progressive validation, and says more of a model in service
than any held-out split: it is the quality of yesterday's model on today's requests.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.config import RunConfig
from pipeline.data.logs import Dataset
from pipeline.errors import ConfigError
from pipeline.evaluate.report import as_dict, print_report
from pipeline.job import ConsoleReporter, go_on, member, start_tracker, start_warm, write_status
from pipeline.job.judging import metrics_of
from pipeline.progress import Bar
from pipeline.train import checkpoint
from pipeline.train.checkpoint import CheckpointState, CheckpointWriter, Shelf
from pipeline.train.days import DayChoices, Lesson, day_digest, days_to_come
from pipeline.train.judge import PredictionCollector, gather, judge
from pipeline.train.sharding import Ranks
from pipeline.train.supervision import Supervision
from pipeline.train.trainer import Trainer

# Split under which the scores of the next day are recorded: next/hf/click/auc.
NEXT = "next"


@dataclass(frozen=True, kw_only=True)
class DailyResult:
    """What a call of `run_days` has done.

    Args:
        folder: of the run.
        days: trained on in this call, in order.
        scores: of each day before it was trained on; empty on ranks other than the first.
        checkpoint: the last one; None if there was never a day to train on.
        stopped: whether the run was told to leave before the last day's end.
    """

    folder: Path
    days: tuple[str, ...]
    scores: dict[str, Any]
    checkpoint: Path | None
    stopped: bool


def run_days(
    config: RunConfig,
    data: Path,
    folder: Path,
    *,
    console: Console,
    choices: DayChoices,
    warm: Path | None = None,
    fresh: tuple[str, ...] = (),
) -> DailyResult:
    """Train on every day of the log that this run has not seen; every rank calls this.

    Call it again when the log has more days. Numeric features keep the moments of the first day; vocabularies may
    grow (not hashed ones), whose new rows start from first values.

    Args:
        config: the run; `epochs` is of each day, held-out days are not used.
        data: folder of the log.
        folder: of the run.
        console: where the first rank tells of progress.
        choices: what to do about days that are missing, late or changed.
        warm: checkpoint of another run to start the first day from.
        fresh: what keeps its first values all the same.

    Raises:
        TrefoilError: the run does not fit the log, the folder holds another run, or a day is not as it should be.
    """
    if config.optimizer.decay != "none":
        raise ConfigError(
            f"optimizer.decay is {config.optimizer.decay!r}, and training day after day has no last step to decay to: "
            "give --optimizer.decay none"
        )
    dataset = Dataset.open(data)
    with (
        member(config, folder) as (ranks, supervision),
        start_tracker(config, dataset, folder, ranks) as tracker,
        Bar(console, "steps") as bar,
    ):
        course = _Course(config, dataset, folder, console, ranks, supervision, ConsoleReporter(console, tracker, bar))
        days, stopped = course.follow(choices, warm, fresh)
        write_status(folder, ranks, "pre-empted" if stopped else "finished", days=list(days))
        last = checkpoint.newest(folder / "checkpoints")
        if last is not None:
            tracker.set_tags({"checkpoint": str(last.absolute())})
        course.reporter.log_gates()
        return DailyResult(folder=folder, days=days, scores=course.scores, checkpoint=last, stopped=stopped)


class _Course:
    """One call of `run_days` on this rank."""

    def __init__(
        self,
        config: RunConfig,
        dataset: Dataset,
        folder: Path,
        console: Console,
        ranks: Ranks,
        supervision: Supervision,
        reporter: ConsoleReporter,
    ) -> None:
        self.config, self.dataset, self.folder = config, dataset, folder
        self.console, self.ranks, self.supervision, self.reporter = console, ranks, supervision, reporter
        self.scores: dict[str, Any] = {}
        with supervision.watching():
            self.writer = CheckpointWriter(folder / "checkpoints", config.checkpoint, ranks, supervision.beat)

    def follow(self, choices: DayChoices, warm: Path | None, fresh: tuple[str, ...]) -> tuple[tuple[str, ...], bool]:
        """Train on the days to come; returns those trained on, and whether the run was told to leave."""
        shelf = Shelf(folder=self.folder / "checkpoints", config=self.config.checkpoint)
        path, _ = shelf.newest_good(self.ranks)
        state = checkpoint.read_state(path) if path is not None else None
        trained: list[str] = []
        days = list(days_to_come(self.dataset, self.config.days, state.days_done if state else {}, choices))
        if state is not None and (begun := self._begun(state)) is not None:
            days = [begun, *(d for d in days if d != begun)]
        if not days and self.ranks.is_first:
            self.console.print(
                f"no day to train on: the run has seen {', '.join(state.days_done) if state else 'none'}"
            )
        for day in days:
            trainer = self._trainer(day, state)
            if not go_on(trainer, self.folder, self.console) and warm is not None:
                start_warm(trainer, warm, fresh, self.folder, self.console)
            if not self._teach(trainer, day, scored=state is not None and bool(state.days_done)):
                return tuple(trained), True
            trained.append(day)
            state = trainer.state
        return tuple(trained), False

    def _begun(self, state: CheckpointState) -> str | None:
        """The day in the middle of which the checkpoint was written, if it was."""
        (day,) = state.training_days
        return None if state.days_done.get(day) == state.dataset else day

    def _trainer(self, day: str, state: CheckpointState | None) -> Trainer:
        epochs = self.config.epochs
        lesson = Lesson(
            day=day,
            digest=day_digest(self.dataset, day),
            first_epoch=state.epoch // epochs * epochs if state is not None else 0,
            moments=state.moments if state is not None else None,
            days_done=state.days_done if state is not None else {},
        )
        return Trainer(
            self.config,
            self.dataset,
            self.ranks,
            self.folder / "checkpoints",
            self.reporter,
            self.supervision,
            lesson,
            self.writer,
        )

    def _teach(self, trainer: Trainer, day: str, *, scored: bool) -> bool:
        """Score a day, then train on it; returns whether it was trained on to its end."""
        started = trainer.position.epoch > trainer.first_epoch or trainer.position.step > 0
        if scored and not started:
            collector = PredictionCollector(self.config.surfaces, self.config.tasks)
            trainer.predict((day,), collector.add)
            if trainer.stopped:
                return False
            self._score(trainer, day, collector)
        trainer.train()
        return not trainer.stopped

    def _score(self, trainer: Trainer, day: str, collector: PredictionCollector) -> None:
        """Judge what the model, which has not seen the day, says of it."""
        path = self.folder / "predictions" / f"{NEXT}-{day}.parquet"
        predictions = gather(collector, path, self.ranks, self.dataset)
        if predictions is None:
            return
        assert trainer.lesson is not None, "every day is a lesson"
        # The baseline must not know the day either.
        before = tuple(d for d in self.dataset.days if d in trainer.lesson.days_done)
        comparison = judge(predictions, self.dataset, before, resamples=self.config.bootstrap_resamples)
        values = metrics_of(comparison, split=NEXT)
        self.reporter.tracker.log_metrics(values, step=trainer.position.epoch)
        scored = checkpoint.newest(self.folder / "checkpoints")
        if scored is not None:
            checkpoint.record_metrics(scored, values)
        self.scores[day] = as_dict(comparison)
        report = path.parent.parent / f"{NEXT}-{day}_metrics.json"
        report.write_text(json.dumps({"days": [day], **self.scores[day]}, indent=1) + "\n")
        self.console.print(f"\n{day}, before it is trained on:")
        print_report(comparison, console=self.console)
