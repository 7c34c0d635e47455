"""What is trained: a model and its losses, as one module on one device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from components.engagement_model import EngagementModel, ModelOutputs
from components.losses import MultiTaskLoss
from pipeline.data.batch import Batch


class StepOutputs(NamedTuple):
    """What a step gives beside its losses. C candidates, T tasks.

    Fields:
        batch: the batch on the device, for its labels and identity.
        losses: [2 * T] (ranking, then calibration), detached.
        logits: raw logits [C, T], detached.
        calibrated: calibrated logits [C, T], detached.
    """

    batch: Batch
    losses: Tensor
    logits: Tensor
    calibrated: Tensor


class Objective(nn.Module):
    """Losses of the ranking logits and, on detached logits, of the calibration.

    Args:
        loss: loss per task.
    """

    def __init__(self, *, loss: MultiTaskLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, outputs: ModelOutputs, batch: Batch) -> tuple[Tensor, StepOutputs]:
        """Returns losses [2 * T] (ranking, then calibration) and the step's outputs."""
        losses = [
            self.loss(
                logits,
                batch.labels,
                batch.label_mask,
                batch.weights,
                batch.task_normalizer,
                batch.inputs.candidates_per_surface,
            )
            for logits in (outputs.logits, outputs.calibrated)
        ]
        joined = torch.cat(losses)
        return joined, StepOutputs(batch, joined.detach(), outputs.logits.detach(), outputs.calibrated.detach())


class TrainTask(nn.Module):
    """`forward(batch)` as TorchRec's train pipelines want it: (losses, outputs); they sum and differentiate losses.

    Args:
        model: the model.
        objective: its losses; a module of its own so that the pipeline's tracer keeps it whole.
        bf16_on: type of the device, "cpu" or "cuda", on which training runs under bfloat16 autocast; None for float32.
    """

    def __init__(self, *, model: EngagementModel, objective: Objective, bf16_on: str | None = None) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.bf16_on = bf16_on

    def forward(self, batch: Batch) -> tuple[Tensor, StepOutputs]:
        if self.bf16_on is None or not self.training:
            return self.objective(self.model(batch.inputs), batch)
        with torch.autocast(self.bf16_on, torch.bfloat16):
            return self.objective(self.model(batch.inputs), batch)
