"""One training step: TorchRec's train pipeline with a clock in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from components.engagement_model import EngagementBody
from pipeline.config import ShardingConfig
from pipeline.data.batch import Batch
from pipeline.train.clock import StepClock
from pipeline.train.pipelining import build_pipeline
from pipeline.train.task import StepOutputs

# What a pipeline that overlaps does to send ids to the ranks that hold their rows.
EXCHANGES = ("start_sparse_data_dist", "wait_sparse_data_dist")


class ClockedOptimizer:
    """What a pipeline wants of an optimizer, with the clock switched and a look at the gradients before they are used.

    Args:
        optimizer: the optimizer.
        clock: of the step.
        before_step: called when all gradients are there.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, clock: StepClock, before_step: Callable[[], None]) -> None:
        self._optimizer, self._clock, self._before_step = optimizer, clock, before_step

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._optimizer.zero_grad(set_to_none=set_to_none)

    def step(self) -> None:
        self._clock.switch("optimizer")
        self._before_step()
        self._optimizer.step()
        self._clock.switch("other")


class Step:
    """Trains on one batch after another.

    Args:
        model: the sharded task.
        optimizer: of tables and dense parameters.
        sharding: of the run; chooses the pipeline.
        device: where it runs.
        clock: told of every part.
        before_step: called when all gradients of a step are there.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        sharding: ShardingConfig,
        device: torch.device,
        *,
        clock: StepClock,
        before_step: Callable[[], None],
    ) -> None:
        clocked: Any = ClockedOptimizer(optimizer, clock, before_step)
        self.pipeline: Any = build_pipeline(model, clocked, sharding, device)
        for name in EXCHANGES:
            if hasattr(self.pipeline, name):
                setattr(self.pipeline, name, _timed(getattr(self.pipeline, name), clock, "exchange"))
        body = next(m for m in model.modules() if isinstance(m, EngagementBody))
        model.register_forward_pre_hook(lambda *_: _enter(clock, "lookup"))
        body.register_forward_pre_hook(lambda *_: _enter(clock, "forward"))
        # A scoring step ends with its forward pass; a training step goes on with the backward pass.
        model.register_forward_hook(lambda module, *_: _enter(clock, "backward" if module.training else "other"))

    def over(self, batches: Iterator[Batch]) -> Iterator[StepOutputs]:
        """A step for each batch, in training mode with updates, else without."""
        while True:
            try:
                outputs = self.pipeline.progress(batches)
            except StopIteration:
                return
            yield outputs


def _enter(clock: StepClock, part: str) -> None:
    clock.switch(part)


def _timed(work: Callable[..., Any], clock: StepClock, part: str) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        with clock.during(part):
            return work(*args, **kwargs)

    return timed


def waiting(batches: Iterator[Batch], clock: StepClock) -> Iterator[Batch]:
    """The same batches; the time that the consumer waits for each is on the clock."""
    while True:
        with clock.during("wait"):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch
