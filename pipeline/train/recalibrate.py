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

`fit_map` does the same with all parameters of a map, scale or slopes too, by L-BFGS (Nocedal 1980); there b^2 is the
squared distance of the parameters from where training left them, and z are the logits before calibration.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from components.calibration import GlobalCalibration, SurfaceCalibration
from components.names import surface_key
from pipeline.errors import ConfigError
from pipeline.train.task import StepOutputs

NEWTON_STEPS = 50
TOLERANCE = 1e-10
LBFGS_STEPS = 100
LONGEST_STEP = 1.0  # logits; a step of Newton's method far from the maximum may be wild

Sum = Callable[[Tensor], Tensor]


class LogitCollector:
    """Logits, labels and weights of held-out rows, by surface; of one rank, in host memory.

    Args:
        surfaces: of the model, in batch order.
        calibrated: whether to keep logits after calibration, or before it.
    """

    def __init__(self, surfaces: tuple[str, ...], *, calibrated: bool = True) -> None:
        self.surfaces, self.calibrated = surfaces, calibrated
        self._parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {s: [] for s in surfaces}

    def add(self, day: str, outputs: StepOutputs) -> None:
        """Keep a step's rows."""
        counts = outputs.batch.inputs.candidates_per_surface
        weights = outputs.batch.weights.unsqueeze(1) * outputs.batch.label_mask
        labels = torch.where(outputs.batch.label_mask, outputs.batch.labels, 0.0)
        logits = outputs.calibrated if self.calibrated else outputs.logits
        ends = [sum(counts[:i]) for i in range(len(counts) + 1)]
        for surface, (start, end) in zip(self.surfaces, pairwise(ends), strict=True):
            rows = tuple(v[start:end].double().cpu() for v in (logits, labels, weights))
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


def fit_map(of: nn.Module, logits: Tensor, labels: Tensor, weights: Tensor, *, prior: float, total: Sum) -> nn.Module:
    """A copy of a calibration map whose parameters maximise the formula; float64, in host memory.

    Args:
        of: an `AffineMap` or a `PiecewiseMap`, as training left it.
        logits: before calibration, float64 [C, T].
        labels, weights: float64 [C, T]; weight 0 where an outcome was not observed.
        prior: standard deviation of each parameter around its trained value, above 0.
        total: sums a tensor over all ranks.
    """
    fitted = copy.deepcopy(of).cpu().double()
    parameters = list(fitted.parameters())
    trained = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=LBFGS_STEPS, tolerance_grad=TOLERANCE, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        local = binary_cross_entropy_with_logits(fitted(logits), labels, weights, reduction="sum")
        gradients = torch.autograd.grad(local, parameters)
        # Every rank gets the same sums, and so takes the same steps.
        loss, *summed = total(torch.cat([local.detach().view(1), *(g.flatten() for g in gradients)])).split(
            [1, *(p.numel() for p in parameters)]
        )
        for parameter, start, gradient in zip(parameters, trained, summed, strict=True):
            away = parameter.detach() - start
            parameter.grad = gradient.view_as(parameter) + away / prior**2
            loss = loss + away.square().sum() / (2 * prior**2)
        return loss.squeeze()

    optimizer.step(closure)
    return fitted


def recalibrate(model: nn.Module, collected: LogitCollector, *, prior: float, total: Sum) -> dict[str, Tensor]:
    """Fit a model's calibration to held-out days; every rank calls this.

    Args:
        model: holds a `SurfaceCalibration` or a `GlobalCalibration`.
        collected: this rank's rows of the held-out days; their calibrated logits move the biases alone, those before
            calibration all parameters of the maps.
        prior: standard deviation of the prior, in logits.
        total: sums a tensor over all ranks.

    Returns:
        what was added to the biases [T] of each surface, or of "all surfaces" where they share one map.

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
        rows = collected.rows(surfaces, len(module.tasks))
        bias = of.bias
        assert isinstance(bias, Tensor)
        if collected.calibrated:
            shifts[name] = intercept_shift(*rows, prior=prior, total=total)
            with torch.no_grad():
                bias += shifts[name].to(bias)
        else:
            before = bias.detach().double().cpu()
            of.load_state_dict(fit_map(of, *rows, prior=prior, total=total).state_dict())
            shifts[name] = bias.detach().double().cpu() - before
    return shifts
