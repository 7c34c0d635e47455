"""Calibration moved to the newest days, after training.

Click rates drift from day to day, and a model trained up to the day before yesterday predicts the rates of its
training days. So after training, the bias of each surface's and task's calibration is fitted once more on the
validation days, which lie between the training days and the days that are scored. The prior holds it: a surface
with a hundred clicks a day says little about its own rate, and stays nearly where training left it.

Formula, for the calibrated logits z, labels y and weights w of one surface and task:

    shift = argmax_b  sum_c w_c log p(y_c | sigmoid(z_c + b))  -  b^2 / (2 prior^2)

that is, the intercept of a logistic regression with offset z under a Normal(0, prior^2) prior (the shift of
"calibration in the large", Steyerberg, "Clinical Prediction Models", 2009, with shrinkage). It is concave in b;
Newton's method finds the only maximum. The order of candidates within a surface does not change.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from components.calibration import GlobalCalibration, SurfaceCalibration
from components.names import surface_key
from pipeline.errors import ConfigError
from pipeline.train.task import StepOutputs

NEWTON_STEPS = 50
TOLERANCE = 1e-10
LONGEST_STEP = 1.0  # logits; a step of Newton's method far from the maximum may be wild

Sum = Callable[[Tensor], Tensor]


class LogitCollector:
    """Calibrated logits, labels and weights of held-out rows, by surface; of one rank, in host memory.

    Args:
        surfaces: of the model, in batch order.
    """

    def __init__(self, surfaces: tuple[str, ...]) -> None:
        self.surfaces = surfaces
        self._parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {s: [] for s in surfaces}

    def add(self, day: str, outputs: StepOutputs) -> None:
        """Keep a step's rows."""
        counts = outputs.batch.inputs.candidates_per_surface
        weights = outputs.batch.weights.unsqueeze(1) * outputs.batch.label_mask
        labels = torch.where(outputs.batch.label_mask, outputs.batch.labels, 0.0)
        ends = [sum(counts[:i]) for i in range(len(counts) + 1)]
        for surface, (start, end) in zip(self.surfaces, pairwise(ends), strict=True):
            rows = tuple(v[start:end].double().cpu() for v in (outputs.calibrated, labels, weights))
            self._parts[surface].append((rows[0], rows[1], rows[2]))

    def rows(self, surfaces: tuple[str, ...], tasks: int) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, labels and weights of the given surfaces, each float64 [C, T]."""
        parts = [part for s in surfaces for part in self._parts[s]]
        empty = torch.zeros(0, tasks, dtype=torch.float64)
        logits, labels, weights = (torch.cat([empty, *(p[i] for p in parts)]) for i in range(3))
        return logits, labels, weights


def intercept_shift(logits: Tensor, labels: Tensor, weights: Tensor, *, prior: float, total: Sum) -> Tensor:
    """The shift of the formula for each column: float64 [T].

    Args:
        logits, labels, weights: float64 [C, T]; weight 0 where an outcome was not observed.
        prior: standard deviation of the prior, in logits, above 0.
        total: sums a tensor over all ranks.
    """
    shift = torch.zeros(logits.shape[1], dtype=torch.float64)
    for _ in range(NEWTON_STEPS):
        p = torch.sigmoid(logits + shift)
        local = torch.stack([(weights * (labels - p)).sum(0), (weights * p * (1 - p)).sum(0)])
        gradient, curvature = total(local)
        step = (gradient - shift / prior**2) / (curvature + 1 / prior**2)
        shift = shift + step.clamp(-LONGEST_STEP, LONGEST_STEP)
        if step.abs().max() < TOLERANCE:
            break
    return shift


def recalibrate(model: nn.Module, collected: LogitCollector, *, prior: float, total: Sum) -> dict[str, Tensor]:
    """Add the shifts to the biases of a model's calibration; every rank calls this.

    Args:
        model: holds a `SurfaceCalibration` or a `GlobalCalibration`.
        collected: this rank's rows of the held-out days.
        prior: standard deviation of the prior, in logits.
        total: sums a tensor over all ranks.

    Returns:
        shift [T] of each surface, or of "all surfaces" where they share one map.

    Raises:
        ConfigError: the model has no calibration to move.
    """
    for module in model.modules():
        if isinstance(module, SurfaceCalibration | GlobalCalibration):
            break
    else:
        raise ConfigError("the model has no calibration to move; set model.calibration, or no recalibration_prior")
    maps: dict[str, tuple[nn.Module, tuple[str, ...]]]
    if isinstance(module, SurfaceCalibration):
        maps = {s: (module.maps[surface_key(s)], (s,)) for s in module.surfaces}
    else:
        maps = {"all surfaces": (module.map, collected.surfaces)}
    shifts = {}
    for name, (of, surfaces) in maps.items():
        shifts[name] = intercept_shift(*collected.rows(surfaces, len(module.tasks)), prior=prior, total=total)
        bias = of.bias
        assert isinstance(bias, Tensor)
        with torch.no_grad():
            bias += shifts[name].to(bias)
    return shifts
