"""The training run: load, step, save, validate."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from components.engagement_model import EngagementBody
from pipeline.config import RunConfig
from pipeline.data.batch import Batch
from pipeline.data.loader import Loader
from pipeline.data.logs import Dataset
from pipeline.errors import DataError
from pipeline.schema import Kind
from pipeline.train import checkpoint
from pipeline.train.build import build_task
from pipeline.train.clock import StepClock
from pipeline.train.constraints import table_loads
from pipeline.train.days import DaySplit, Lesson, split_days
from pipeline.train.model_plan import model_plan
from pipeline.train.numerics import set_numerics
from pipeline.train.observe import StepWindow, profiled
from pipeline.train.optimizers import build_optimizer
from pipeline.train.pipelining import compile_blocks
from pipeline.train.recalibrate import LogitCollector, recalibrate
from pipeline.train.sharding import Ranks, shard
from pipeline.train.step import Step, waiting
from pipeline.train.supervision import Supervision
from pipeline.train.tables import fill_tables, table_of
from pipeline.train.task import StepOutputs


class Reporter(Protocol):
    """Where a run tells of itself; called on the first rank only."""

    def plan(self, trainer: Trainer) -> None: ...

    def progress(self, *, epoch: int, step: int, steps: int, metrics: dict[str, float]) -> None: ...

    def step(self, done: int, total: int, what: str) -> None: ...


@dataclass
class Position:
    """How far a run is: passes finished, and steps finished within the next one."""

    epoch: int = 0
    step: int = 0


class Trainer:
    """One run on this rank. `train()` runs it to its end; the sharded model stays in `model`.

    Args:
        config: the run.
        dataset: its log.
        ranks: this process among its peers.
        folder: where checkpoints go.
        reporter: told of progress on the first rank; None for silence.
        supervision: says when to leave, and is told of every step.
        lesson: the day to train on in continuous training; None trains on the days of the configuration.
        writer: of checkpoints, where an earlier day's trainer has one; None makes one.
        profile_steps: first and last step of this process to write a profiler's trace of, into `traces` beside the
            checkpoints; None for no trace.

    Attributes:
        stopped: whether the run was told to leave, as all ranks agree; what was reached is saved.
        shifts: by surface, what recalibration added to each task's bias, in logits; empty before or without it.

    Raises:
        ConfigError, SchemaError, DataError: the run does not fit the log.
    """

    def __init__(
        self,
        config: RunConfig,
        dataset: Dataset,
        ranks: Ranks,
        folder: Path,
        reporter: Reporter | None = None,
        supervision: Supervision | None = None,
        lesson: Lesson | None = None,
        writer: checkpoint.CheckpointWriter | None = None,
        profile_steps: tuple[int, int] | None = None,
    ) -> None:
        self.config = config
        self.dataset = dataset
        self.ranks = ranks
        self.folder = folder
        self.reporter = reporter if ranks.is_first else None
        self.supervision = supervision or Supervision()
        self.lesson = lesson
        self.stopped = False
        self.shifts: dict[str, torch.Tensor] = {}
        self.profile_steps = profile_steps
        self.days: DaySplit = lesson.split if lesson is not None else split_days(dataset, config.days)
        moments = (lesson.moments if lesson is not None else None) or {
            f.name: dataset.numeric_moments(f.name, self.days.train) for f in dataset.schema.select(kind=Kind.NUMERIC)
        }
        self.plan = model_plan(config, dataset.schema, moments)
        self.loader = self.make_loader(self.days.train)
        for surface, size in self.loader.sizes.items():
            if not size:
                raise DataError(
                    f"surface {surface!r} has no request on the training days {self.days.train[0]} to "
                    f"{self.days.train[-1]}; choose other days or leave the surface out of the recipe",
                    file=str(dataset.root),
                )
        with self.supervision.watching():
            self.model = self._sharded_model()
            self.writer = writer or checkpoint.CheckpointWriter(folder, config.checkpoint, ranks, self.supervision.beat)
        self.total_steps = self.loader.steps * config.epochs
        self.optimizer = build_optimizer(self.model, config.optimizer, total_steps=self.total_steps)
        self.first_epoch = lesson.first_epoch if lesson is not None else 0
        self.last_epoch = self.first_epoch + config.epochs
        self.position = Position(self.first_epoch)
        # Name and metrics of what was last saved or loaded.
        self._saved = ""
        self._metrics: dict[str, float] = {}
        self.clock = StepClock(ranks.device)
        self.window = StepWindow(config, ranks, self.model, self.clock, folder.parent, waited_s=self.loader.waited_s)
        self.step = Step(
            self.model,
            self.optimizer,
            config.sharding,
            ranks.device,
            clock=self.clock,
            before_step=self.window.before_step,
        )

    def _sharded_model(self) -> torch.nn.Module:
        torch.manual_seed(self.config.seed)
        compute = self.config.compute
        set_numerics(compute, self.ranks.device)
        task = build_task(self.plan, table_device=torch.device("meta"))
        task.bf16_on = self.ranks.device.type if compute.bf16 else None
        body: EngagementBody = task.model.body
        body.micro_batches = compute.micro_batches
        if compute.compile:
            compile_blocks(body)
        requests = -(-self.config.loader.requests_per_batch // self.ranks.world_size)
        model = shard(
            task,
            sharding=self.config.sharding,
            optimizer=self.config.optimizer,
            ranks=self.ranks,
            requests_per_rank=requests,
            loads=table_loads(
                self.plan,
                requests_per_rank=requests,
                candidates_per_request=self.dataset.candidates_per_request(self.config.surfaces),
            ),
        )
        fill_tables(model, seed=self.config.seed, scale=self.config.model.table_scale)
        return model

    def make_loader(self, days: tuple[str, ...], *, scoring: bool = False) -> Loader:
        """A loader of this rank's share of the given days; for scoring in the files' order, every candidate kept."""
        config = self.config.loader
        return Loader(
            self.dataset,
            self.plan.layout,
            replace(config, shuffle=False, max_candidates=None) if scoring else config,
            quarantine_report=self.folder.parent / "quarantine.jsonl",
            days=days,
            seed=self.config.seed,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
        )

    @property
    def dense_parameters(self) -> int:
        """Number of dense parameters, which every rank holds whole."""
        return sum(p.numel() for name, p in self.model.named_parameters() if table_of(name) is None)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint, written by any number of ranks.

        Raises:
            CheckpointError: it is of another run, or damaged.
        """
        growing = self.lesson is not None
        state = checkpoint.resume(path, self.state, self.model, self.optimizer, growing=growing)
        self.position = Position(state.epoch, state.step)
        self._saved = state.name

    @property
    def state(self) -> checkpoint.CheckpointState:
        """What a checkpoint written now would say of itself."""
        return checkpoint.CheckpointState(
            format_version=3,
            config=self.config,
            schema=self.dataset.schema,
            moments=dict(self.plan.moments),
            dataset=self.lesson.digest if self.lesson is not None else self.dataset.fingerprint,
            training_days=self.days.train,
            epoch=self.position.epoch,
            step=self.position.step,
            days_done=self._days_done,
        )

    @property
    def _days_done(self) -> dict[str, str]:
        if self.lesson is None:
            return {}
        finished = self.position.epoch == self.last_epoch
        return {**self.lesson.days_done, **({self.lesson.day: self.lesson.digest} if finished else {})}

    def train(self) -> Path:
        """Train to the end, or until told to leave (`stopped`); returns the last checkpoint.

        Raises:
            CheckpointError: a checkpoint could not be written.
        """
        if self.reporter is not None:
            self.reporter.plan(self)
        self.model.train()
        while self.position.epoch < self.last_epoch and not self.stopped:
            self._train_epoch()
            if not self.stopped:
                self.position = Position(self.position.epoch + 1, 0)
        if self.config.recalibration_prior is not None and self.state.name != self._saved and not self.stopped:
            self._recalibrate(self.config.recalibration_prior)
        path = self.save()
        self.writer.finish()
        self.supervision.rest()
        return path

    def _recalibrate(self, prior: float) -> None:
        """Fit the calibration on the validation days; a run told to leave does so when it goes on."""
        collected = LogitCollector(self.config.surfaces, calibrated=self.config.recalibrates == "bias")
        self.predict(self.days.validation, collected.add)
        if self.stopped:
            self.position = Position(self.position.epoch - 1, self.loader.steps)
            return
        self.shifts = recalibrate(self.model, collected, prior=prior, total=self.ranks.sum)

    def save(self) -> Path:
        """Begin to write a checkpoint of the position reached, if there is none yet; every rank calls this."""
        state = self.state
        if state.name != self._saved:
            # A checkpoint of parameters that went bad would be gone on with.
            self.window.check()
            self.writer.save(state, self.model, self.optimizer, metrics=self._metrics)
            self._saved = state.name
        return self.folder / state.name

    def _train_epoch(self) -> None:
        batches = self.loader.batches(self.position.epoch, self.position.step)
        self.window.begin(self.loader.waited_s)
        self.window.look(self._reports_after(self.position.step + 1))
        with profiled(self._profile_steps(), self.folder.parent / "traces", self.ranks.rank) as profiler:
            what = f"epoch {self.position.epoch + 1} of {self.last_epoch}"
            for outputs in self.steps(batches, what, done=self.position.step, total=self.loader.steps):
                self.position.step += 1
                self.window.add(self.position.epoch, self.position.step, outputs)
                if self._reports_after(self.position.step):
                    self._metrics = self.window.close(self.loader.waited_s)
                    self._metrics |= self._settings()
                    self._report(self._metrics)
                self.window.look(self._reports_after(self.position.step + 1))
                every = self.config.checkpoint.steps
                if every and self.position.step % every == 0 and self.position.step < self.loader.steps:
                    self.save()
                if profiler is not None:
                    profiler.step()

    def steps(
        self, batches: Iterator[Batch], what: str = "", *, done: int = 0, total: int = 0
    ) -> Iterator[StepOutputs]:
        """A step for each batch until ranks agree to stop, in training mode with updates; every rank calls this.

        Args:
            batches: of this rank.
            what: the piece of work, for the reporter.
            done: steps of it that were done before.
            total: steps of it; with none the reporter is told nothing.
        """
        steps = self.step.over(self._agreed(batches))
        while True:
            torch.manual_seed(self._step_seed())
            outputs = next(steps, None)
            if outputs is None:
                return
            self.supervision.beat()
            done += 1
            if self.reporter is not None and total:
                self.reporter.step(done, total, what)
            yield outputs

    def _settings(self) -> dict[str, float]:
        """Learning rates as they stand, and how long saving has held up training."""
        rates = {f"train/{n}_lr": float(o.param_groups[0]["lr"]) for n, o in self.optimizer.optimizers}
        return rates | {"train/checkpoint_stall_s": self.writer.stalled_s}

    def _reports_after(self, step: int) -> bool:
        return step % self.config.log_steps == 0 or step == self.loader.steps

    def _profile_steps(self) -> tuple[int, int] | None:
        """Steps to profile, asked for once."""
        steps, self.profile_steps = self.profile_steps, None
        return steps

    def _step_seed(self) -> int:
        """Seed of what is random within the next step (dropout): no state to save, and the same when resumed."""
        key = f"{self.config.seed}/{self.position.epoch}/{self.position.step}/{self.ranks.rank}"
        return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "little")

    def predict(self, days: tuple[str, ...], consume: Callable[[str, StepOutputs], None]) -> None:
        """Score days in order, each whole, with the model as it stands; every rank calls this.

        Args:
            days: which days.
            consume: gets the day and each step's outputs of this rank.
        """
        self.model.eval()
        with torch.no_grad():
            for day in days:
                if self.stopped:
                    break
                loader = self.make_loader((day,), scoring=True)
                for outputs in self.steps(loader.batches(0), f"scoring {day}", total=loader.steps):
                    consume(day, outputs)
        self.model.train()
        self.supervision.rest()

    def _agreed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Batches whose losses are divided by the mean total over ranks, so that their gradients' mean is the
        gradient of the mean over the global batch, however rows fell to ranks. The same exchange carries whether a
        rank must stop, so that batches end after the same one on all."""
        for batch in waiting(batches, self.clock):
            must_stop = self.supervision.leaving or self.writer.failed
            total = self.ranks.sum(torch.cat([batch.task_normalizer, batch.task_normalizer.new_tensor([must_stop])]))
            yield replace(batch, task_normalizer=total[:-1] / self.ranks.world_size)
            if total[-1] > 0:
                self.stopped = True
                return

    def _report(self, metrics: dict[str, float]) -> None:
        if self.reporter is not None:
            self.reporter.progress(
                epoch=self.position.epoch, step=self.position.step, steps=self.loader.steps, metrics=metrics
            )
