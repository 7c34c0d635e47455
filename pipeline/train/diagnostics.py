"""What happens inside a unified model: who uses which expert, and whether surfaces pull parameters apart.

`gate_utilisation` reads the gates of an MMoE on a batch (Ma et al., KDD 2018): gates that treat surfaces alike, or an
expert that nobody uses, say that the mixture does nothing. `gradient_conflict` compares the gradients of the surfaces'
losses on the parameters that all share (Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020): a cosine
below 0 means that a step for one surface is a step against the other. Both read a model on one device, unsharded.

Shape letters: C candidates, T tasks, E experts, G groups of batches, P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import cast

import torch
from torch import Tensor

from components.losses import masked_bce
from components.mmoe import GateLoad, MMoE
from components.names import surface_of
from components.ragged import split_surfaces
from pipeline.data.batch import Batch
from pipeline.errors import ConfigError
from pipeline.train.gates import GateWatch
from pipeline.train.tables import table_of
from pipeline.train.task import TrainTask

GROUPS = 64  # of batches, whose gradients are held
FEWEST = 5  # groups that an interval wants
BOUND = 1.959964  # of a standard normal, 95 %
EPSILON = 1e-12


@dataclass(frozen=True, kw_only=True)
class Conflict:
    """How two surfaces' gradients agree.

    Args:
        cosine: of the gradients averaged over all batches; what training follows in the long run.
        cosine_interval: 95 % interval over batches; None where they are too few.
        mean_cosine: mean over batches of the cosine within one batch.
        mean_cosine_interval: 95 % interval over batches.
        opposed: share of batches whose cosine is below 0.
        norm_ratio: norm of the first surface's averaged gradient over the second's.
    """

    cosine: float
    cosine_interval: tuple[float, float] | None
    mean_cosine: float
    mean_cosine_interval: tuple[float, float] | None
    opposed: float
    norm_ratio: float


def gate_utilisation(task: TrainTask, batches: Iterable[Batch]) -> dict[str, GateLoad]:
    """By surface that has rows, how these use the experts: mean gate weight [T, E] and entropy [T].

    Raises:
        ConfigError: the model has no MMoE.
    """
    mixture = task.model.body.mixture
    if not isinstance(mixture, MMoE):
        raise ConfigError("the model has no MMoE, so there are no gates; set model.mixture.kind to mmoe")
    watch = GateWatch(mixture)
    watch.watching = True
    try:
        with torch.no_grad():
            for batch in batches:
                task.model(batch.inputs)
    finally:
        watch.close()
    return watch.take()


def shared_parameters(task: TrainTask) -> dict[str, torch.nn.Parameter]:
    """Dense parameters of ranking that rows of every surface teach, by name."""
    return {
        name: parameter
        for name, parameter in task.named_parameters()
        if surface_of(name) is None and table_of(name) is None and ".calibration." not in name
    }


def surface_gradients(task: TrainTask, batch: Batch) -> dict[str, Tensor]:
    """By surface with rows in the batch, the gradient of the mean loss of its own rows, summed over tasks, as one
    vector over the shared parameters."""
    body = task.model.body
    logits = task.model(batch.inputs).logits
    counts = batch.inputs.candidates_per_surface
    pieces = [
        split_surfaces(v, counts, len(body.surfaces)) for v in (logits, batch.labels, batch.label_mask, batch.weights)
    ]
    parameters = list(shared_parameters(task).values())
    gradients = {}
    for surface, z, label, mask, weight in zip(body.surfaces, *pieces, strict=True):
        if not z.shape[0]:
            continue
        loss = masked_bce(z, label, mask, weight, (weight.unsqueeze(1) * mask).sum(0)).sum()
        found = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        gradients[surface] = torch.cat([g.flatten() for g in found])
    return gradients


def gradient_conflict(task: TrainTask, batches: Iterable[Batch]) -> dict[tuple[str, str], Conflict]:
    """Agreement of each pair of surfaces, over the batches that hold rows of both.

    Intervals are of the jackknife over batches (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter
    11) on Fisher's scale, which keeps them within -1 and 1. A bootstrap would not do: a batch that is drawn twice adds
    its noise twice, and pulls every cosine to 0. Past `GROUPS` batches, groups of them are left out in turn; the sums
    of so many groups' gradients are held in memory for each surface.
    """
    sums: dict[str, dict[int, Tensor]] = {}
    within: dict[tuple[str, str], list[float]] = {pair: [] for pair in combinations(task.model.body.surfaces, 2)}
    for i, batch in enumerate(batches):
        gradients = surface_gradients(task, batch)
        for surface, gradient in gradients.items():
            of, group = sums.setdefault(surface, {}), i % GROUPS
            of[group] = of[group] + gradient if group in of else gradient
        for a, b in within:
            if a in gradients and b in gradients:
                within[a, b].append(_cosine(gradients[a], gradients[b]))
    groups = sorted({group for of in sums.values() for group in of})
    stacked = {surface: _stacked(of, groups) for surface, of in sums.items()}
    return {(a, b): _conflict(stacked[a], stacked[b], values) for (a, b), values in within.items() if values}


def _conflict(a_GP: Tensor, b_GP: Tensor, within: list[float]) -> Conflict:
    """Of two surfaces' gradients by group of batches, and their cosines within batches."""
    # The products of all groups with all: leaving a group out takes its row and its column away.
    ab, aa, bb = a_GP @ b_GP.T, a_GP @ a_GP.T, b_GP @ b_GP.T
    left_out = _left_out(ab) / (_left_out(aa) * _left_out(bb)).sqrt()
    cosine = float(ab.sum() / (aa.sum() * bb.sum()).sqrt())
    each = torch.tensor(within, dtype=torch.float64)
    mean = float(each.mean())
    return Conflict(
        cosine=cosine,
        cosine_interval=_jackknife(cosine, left_out),
        mean_cosine=mean,
        mean_cosine_interval=_jackknife(mean, (each.sum() - each) / max(1, len(within) - 1)),
        opposed=sum(v < 0 for v in within) / len(within),
        norm_ratio=float((aa.sum() / bb.sum()).sqrt()),
    )


def _stacked(sums: dict[int, Tensor], groups: list[int]) -> Tensor:
    """Gradients of the groups, zero where a group has none, float64 [G, P]."""
    nothing = torch.zeros_like(next(iter(sums.values())))
    return torch.stack([sums.get(group, nothing) for group in groups]).double()


def _left_out(products_GG: Tensor) -> Tensor:
    """The sum of all products without those of one group, for each group in turn, [G]."""
    return products_GG.sum() - products_GG.sum(0) - products_GG.sum(1) + products_GG.diagonal()


def _jackknife(cosine: float, left_out: Tensor) -> tuple[float, float] | None:
    """95 % interval of a cosine from its values with each group left out, [G]."""
    count = left_out.numel()
    if count < FEWEST or not bool(left_out.isfinite().all()):
        return None
    z = left_out.clamp(-1 + EPSILON, 1 - EPSILON).atanh()
    error = float(((count - 1) / count * (z - z.mean()).square().sum()).sqrt())
    centre = math.atanh(max(-1 + EPSILON, min(1 - EPSILON, cosine)))
    return math.tanh(centre - BOUND * error), math.tanh(centre + BOUND * error)


def _cosine(a: Tensor, b: Tensor) -> float:
    return cast(float, torch.nn.functional.cosine_similarity(a, b, dim=0).item())
