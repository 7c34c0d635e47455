"""Dense optimizers: rates over a run, clipping, and what each kind does with a gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pipeline.config import OptimizerConfig, ShardingConfig
from pipeline.train.optimizers import build_optimizer
from pipeline.train.sharding import joined, shard
from tests.train.test_sharding import Tables


def stepped(gradients: list[float], *, total_steps: int = 100, **settings: Any) -> tuple[list[float], list[float]]:
    """The dense rate after each step, and where the weights [8] of a layer end that start at 0 and get `gradients`
    in the first two places at each step."""
    optimizer = OptimizerConfig(dense_lr=1.0, **{"decay": "none", "dense": "sgd", **settings})
    rates = []
    with joined() as ranks:
        sharded = shard(Tables(), sharding=ShardingConfig(), optimizer=optimizer, ranks=ranks, requests_per_rank=2)
        layer = sharded.module.dense
        assert isinstance(layer, nn.Linear)
        with torch.no_grad():
            layer.weight.zero_()
        combined = build_optimizer(sharded, optimizer, total_steps=total_steps)
        for gradient in gradients:
            combined.zero_grad()
            layer.weight.grad = torch.tensor([[0.6 * gradient, 0.8 * gradient, 0, 0, 0, 0, 0, 0]])
            combined.step()
            rates.append(float(dict(combined.optimizers)["dense"].param_groups[0]["lr"]))
        weights = layer.weight.detach()[0, :2].tolist()
    return rates, weights


def test_the_rate_rises_over_the_warm_up_and_falls_to_zero_at_the_last_step() -> None:
    rates, weights = stepped([1.0] * 10, total_steps=10, warmup_steps=4, decay="linear")
    # After step n, what step n + 1 will use.
    assert rates == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0])
    assert weights == pytest.approx([-0.6 * sum([0, *rates[:-1]]), -0.8 * sum([0, *rates[:-1]])])


@pytest.mark.parametrize(("gradient", "moved"), [(0.5, 0.5), (5.0, 2.0)])
def test_a_long_gradient_is_cut_to_its_bound_and_a_short_one_left_alone(gradient: float, moved: float) -> None:
    _, weights = stepped([gradient], clip_gradient_norm=2.0)
    assert weights == pytest.approx([-0.6 * moved, -0.8 * moved], rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "moved"),
    [
        ({"dense": "sgd"}, 3.0),
        ({"dense": "adam"}, 2.0),  # equal gradients: each step is the rate long
        ({"dense": "adamw"}, 2.0),
        ({"dense": "adagrad"}, 1 + 2 / 5**0.5),  # g / sqrt of the sum of squares, for g = 1 and 2
    ],
)
def test_each_kind_moves_as_its_rule_says(settings: dict[str, Any], moved: float) -> None:
    gradients = [1.0, 1.0] if "adam" in settings["dense"] else [1.0, 2.0]
    _, weights = stepped(gradients, **settings)
    scale = (0.6, 0.8) if settings["dense"] == "sgd" else (1.0, 1.0)
    assert weights == pytest.approx([-s * moved for s in scale], rel=1e-5)


def test_decay_of_weights_pulls_to_zero_beside_the_gradient() -> None:
    _, weights = stepped([1.0, 0.0], dense="adamw", dense_weight_decay=0.25)
    # Adam's first step is 1 long; then a quarter is taken off before a step of the moments alone.
    first = -1.0
    mean, square = 0.9 * 0.1 / (1 - 0.9**2), 0.999 * 0.001 / (1 - 0.999**2)
    assert weights == pytest.approx([first * 0.75 - mean / square**0.5] * 2, rel=1e-4)
