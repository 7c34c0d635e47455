"""Cross layers against a loop over rows and columns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from components.cross import CrossProjection, DCNv2, LinearProjection


def slow_cross(x: Tensor, matrices: list[Tensor], biases: list[Tensor]) -> Tensor:
    """x0 * (W x + b) + x, one number at a time."""
    rows = []
    for x_0 in x:
        x_l = x_0
        for matrix, bias in zip(matrices, biases, strict=True):
            crossed = torch.stack([(matrix[i] * x_l).sum() + bias[i] for i in range(len(x_0))])
            x_l = x_0 * crossed + x_l
        rows.append(x_l)
    return torch.stack(rows)


@pytest.mark.parametrize("rank", [None, 1, 3])
def test_equals_the_loop(rank: int | None) -> None:
    torch.manual_seed(0)
    block = DCNv2(in_dim=5, layers=3, rank=rank)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    if rank is None:
        matrices = [linear.weight for linear in block.cross.linears]
        biases = [linear.bias for linear in block.cross.linears]
    else:
        matrices = [u @ v for u, v in zip(block.cross.W_kernels, block.cross.V_kernels, strict=True)]
        biases = list(block.cross.bias)
    x = torch.randn(4, 5)
    assert_close(block(x), slow_cross(x, matrices, biases), atol=1e-5, rtol=1e-5)
    assert block.out_dim == 5


def test_by_hand() -> None:
    block = DCNv2(in_dim=2, layers=1)
    with torch.no_grad():
        block.cross.linears[0].weight.copy_(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    # [2 * 3 + 2, 3 * 0 + 3]: the product of the two columns appears.
    assert block(torch.tensor([[2.0, 3.0]])).tolist() == [[8.0, 3.0]]


def test_a_zero_column_stays_zero() -> None:
    x = torch.randn(4, 5)
    x[:, 2] = 0.0
    assert not DCNv2(in_dim=5, layers=3, rank=2)(x)[:, 2].any()


def test_projection_is_linear_on_the_crossed_vector() -> None:
    block = CrossProjection(in_dim=4, out_dim=2, layers=2, rank=2)
    x = torch.randn(3, 4)
    assert_close(block(x), block.cross(x) @ block.project.weight.T + block.project.bias)
    assert block.out_dim == 2
    assert block(x[:0]).shape == (0, 2)


def test_linear_projection_is_the_last_step_of_the_crossed_one() -> None:
    crossed, linear = CrossProjection(in_dim=4, out_dim=2), LinearProjection(in_dim=4, out_dim=2)
    linear.project.load_state_dict(crossed.project.state_dict())
    x = torch.randn(3, 4)
    assert_close(crossed(x), linear(crossed.cross(x)))
    assert linear.out_dim == 2
    with pytest.raises(ValueError, match="in_dim is 0; it must be at least 1"):
        LinearProjection(in_dim=0, out_dim=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_dim": 0, "layers": 1}, "in_dim is 0"),
        ({"in_dim": 4, "layers": 0}, "layers is 0; it must be at least 1"),
        ({"in_dim": 4, "layers": 1, "rank": 0}, "rank is 0; it must be at least 1"),
        ({"in_dim": 4, "layers": 1, "rank": 5}, "rank is 5 for a vector of width 4"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DCNv2(**arguments)
    with pytest.raises(ValueError, match="out_dim is 0"):
        CrossProjection(in_dim=4, out_dim=0)
