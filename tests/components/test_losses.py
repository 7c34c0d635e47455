"""The loss against a loop; masks, weights and normalizers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from components.losses import MultiTaskLoss, masked_bce

TASKS = ("click", "save")


def batch(rows: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    labels = torch.rand(rows, 2)
    mask = torch.rand(rows, 2) < 0.6
    return torch.randn(rows, 2), labels, mask, torch.rand(rows), torch.tensor([3.0, 5.0])


def test_equals_the_loop() -> None:
    logits, labels, mask, weights, normalizer = batch()
    loss = MultiTaskLoss(tasks=TASKS, task_weights=[2.0, 0.5], surface_weights=[1.0, 3.0])
    want = [0.0, 0.0]
    for c in range(7):
        for t in range(2):
            if mask[c, t]:
                p = 1 / (1 + math.exp(-logits[c, t]))
                bce = -(labels[c, t] * math.log(p) + (1 - labels[c, t]) * math.log(1 - p)).item()
                share = weights[c].item() * (1.0 if c < 4 else 3.0) / normalizer[t].item()
                want[t] += [2.0, 0.5][t] * share * bce
    got = loss(logits, labels, mask, weights, normalizer, [4, 3])
    assert_close(got, torch.tensor(want), atol=1e-6, rtol=1e-5)


def test_unobserved_labels_have_no_influence_even_as_nan() -> None:
    logits, labels, mask, weights, normalizer = batch()
    logits.requires_grad_()
    want = masked_bce(logits, labels, mask, weights, normalizer)
    got = masked_bce(logits, torch.where(mask, labels, torch.nan), mask, weights, normalizer)
    assert torch.equal(got, want)
    got.sum().backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad != 0, mask)


def test_nothing_observed_gives_zero_and_zero_gradient() -> None:
    logits = torch.randn(3, 2, requires_grad=True)
    loss = masked_bce(logits, torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.bool), torch.ones(3), torch.zeros(2))
    assert loss.tolist() == [0.0, 0.0]
    loss.sum().backward()
    assert logits.grad is not None
    assert not logits.grad.any()


def test_no_rows_give_zero() -> None:
    loss = MultiTaskLoss(tasks=TASKS)(*(x[:0] for x in batch()[:4]), torch.tensor([1.0, 1.0]), [0, 0])
    assert loss.tolist() == [0.0, 0.0]


def test_halves_with_their_mean_normalizer_average_to_the_whole() -> None:
    logits, labels, mask, weights, _ = batch(8)
    whole = (weights.unsqueeze(1) * mask).sum(0)
    want = masked_bce(logits, labels, mask, weights, whole)
    halves = [
        masked_bce(logits[rows], labels[rows], mask[rows], weights[rows], whole / 2)
        for rows in (slice(0, 3), slice(3, 8))
    ]
    assert_close((halves[0] + halves[1]) / 2, want)


def test_low_precision_logits_are_lifted() -> None:
    logits, labels, mask, weights, normalizer = batch()
    got = masked_bce(logits.bfloat16(), labels, mask, weights, normalizer)
    assert got.dtype == torch.float32
    assert_close(got, masked_bce(logits.bfloat16().float(), labels, mask, weights, normalizer))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task_weights": [1.0]}, "got 1 task weights for 2 tasks"),
        ({"task_weights": [1.0, -2.0]}, "weight of task save is -2.0; it must be at least 0"),
        ({"surface_weights": [-1.0]}, r"surface_weights\[0\] is -1.0; it must be at least 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiTaskLoss(tasks=TASKS, **arguments)


def test_surface_weights_want_the_counts_of_every_surface() -> None:
    loss = MultiTaskLoss(tasks=TASKS, surface_weights=[1.0, 1.0])
    with pytest.raises(ValueError, match="counts of 3 surfaces; the module has 2"):
        loss(*batch(), [3, 3, 1])
