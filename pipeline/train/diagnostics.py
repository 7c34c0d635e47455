"""What happens inside a unified model: who uses which expert, and whether surfaces pull parameters apart.

`gate_utilisation` reads the gates of an MMoE on a batch (Ma et al., KDD 2018): gates that treat surfaces alike, or an
expert that nobody uses, say that the mixture does nothing. `gradient_conflict` compares the gradients of the surfaces'
losses on the parameters that all share (Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020): a cosine
below 0 means that a step for one surface is a step against the other. Both read a model on one device, unsharded.

Shape letters: C candidates, T tasks, E experts.
"""

from __future__ import annotations

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


@dataclass(frozen=True, kw_only=True)
class Conflict:
    """How two surfaces' gradients agree.

    Args:
        cosine: of the gradients averaged over all batches; what training follows in the long run.
        mean_cosine: mean over batches of the cosine within one batch.
        opposed: share of batches whose cosine is below 0.
        norm_ratio: norm of the first surface's averaged gradient over the second's.
    """

    cosine: float
    mean_cosine: float
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
    """Agreement of each pair of surfaces, over the batches that hold rows of both."""
    totals: dict[str, Tensor] = {}
    within: dict[tuple[str, str], list[float]] = {pair: [] for pair in combinations(task.model.body.surfaces, 2)}
    for batch in batches:
        gradients = surface_gradients(task, batch)
        for surface, gradient in gradients.items():
            totals[surface] = totals.get(surface, torch.zeros_like(gradient)) + gradient
        for a, b in within:
            if a in gradients and b in gradients:
                within[a, b].append(_cosine(gradients[a], gradients[b]))
    return {
        (a, b): Conflict(
            cosine=_cosine(totals[a], totals[b]),
            mean_cosine=sum(values) / len(values),
            opposed=sum(v < 0 for v in values) / len(values),
            norm_ratio=float(totals[a].norm() / totals[b].norm()),
        )
        for (a, b), values in within.items()
        if values
    }


def _cosine(a: Tensor, b: Tensor) -> float:
    return cast(float, torch.nn.functional.cosine_similarity(a, b, dim=0).item())
