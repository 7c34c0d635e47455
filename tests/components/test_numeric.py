"""Standardising, presence, piecewise-linear encoding, and NaN kept out of values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from components.numeric import NumericFeatures

NAN = float("nan")


def test_by_hand() -> None:
    block = NumericFeatures(mean=[1.0, -2.0], std=[2.0, 0.5], clip=3.0)
    got = block(torch.tensor([[5.0, NAN], [NAN, -2.0], [100.0, -100.0]]))
    assert got.tolist() == [[2.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0], [3.0, -3.0, 1.0, 1.0]]
    assert block.out_dim == 4


def test_absent_differs_from_the_mean() -> None:
    block = NumericFeatures(mean=[1.0], std=[1.0])
    assert not torch.equal(block(torch.tensor([[1.0]])), block(torch.tensor([[NAN]])))


def test_piecewise_linear_by_hand() -> None:
    block = NumericFeatures(mean=[0.0, 0.0], std=[1.0, 1.0], edges=[[0.0, 1.0, 3.0], [-1.0, 0.0, 1.0]])
    got = block(torch.tensor([[2.0, NAN], [0.25, -5.0], [7.0, 0.0]]))[:, 4:]
    assert got.tolist() == [[1.0, 0.5, 0.0, 0.0], [0.25, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]]
    assert block.out_dim == 8


@pytest.mark.parametrize("edges", [None, []])
def test_no_columns(edges: list[list[float]] | None) -> None:
    block = NumericFeatures(mean=[], std=[], edges=edges)
    assert block(torch.zeros(3, 0)).shape == (3, 0)
    assert block.out_dim == 0


def test_absent_values_send_no_nan_back() -> None:
    x = torch.tensor([[NAN, 2.0]], requires_grad=True)
    NumericFeatures(mean=[0.0, 0.0], std=[1.0, 4.0], edges=[[0.0, 4.0]] * 2)(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0.0, 0.5]]  # 1/4 from the value, 1/4 from its bin


def test_statistics_travel_with_the_state() -> None:
    block = NumericFeatures(mean=[0.0], std=[1.0])
    block.load_state_dict(NumericFeatures(mean=[1.0], std=[2.0]).state_dict())
    assert block(torch.tensor([[5.0]])).tolist() == [[2.0, 1.0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mean": [0.0], "std": [1.0, 1.0]}, "got 1 means and 2 standard deviations"),
        ({"mean": [0.0, 0.0], "std": [1.0, 0.0]}, r"std\[1\] is 0.0; it must be above 0"),
        ({"mean": [0.0], "std": [NAN]}, r"std\[0\] is nan; it must be above 0"),
        ({"mean": [0.0], "std": [1.0], "clip": 0.0}, "clip is 0.0; it must be above 0"),
        ({"mean": [0.0], "std": [1.0], "edges": []}, "0 rows for 1 columns"),
        ({"mean": [0.0], "std": [1.0], "edges": [[1.0]]}, r"edges\[0\] has 1 edges"),
        ({"mean": [0.0], "std": [1.0], "edges": [[1.0, 2.0, 2.0]]}, r"edges\[0\] has 2.0 before 2.0; edges must rise"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NumericFeatures(**arguments)
