"""SplitLinear equals the plain layer; MLP equals its formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from components.mlp import MLP, SplitLinear, SplitMLP, concat


@settings(max_examples=25, deadline=None)
@given(counts=st.lists(st.integers(0, 4), min_size=0, max_size=5), seed=st.integers(0, 1000))
def test_split_linear_equals_the_plain_layer_on_the_joint_vector(counts: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    split = SplitLinear(request_dim=3, candidate_dim=2, out_dim=4)
    plain = nn.Linear(5, 4)
    with torch.no_grad():
        plain.weight.copy_(torch.cat([split.request.weight, split.candidate.weight], dim=1))
        plain.bias.copy_(split.request.bias)
    request = torch.randn(len(counts), 3, requires_grad=True)
    candidate = torch.randn(sum(counts), 2, requires_grad=True)
    owner = torch.tensor([r for r, n in enumerate(counts) for _ in range(n)], dtype=torch.int64)
    got = split(request, candidate, owner)
    want = plain(torch.cat([request[owner], candidate], dim=1))
    assert_close(got, want, atol=1e-6, rtol=1e-5)
    leaves = (request, candidate)
    mine = torch.autograd.grad(got.square().sum(), (*leaves, split.request.weight, split.candidate.weight))
    theirs = torch.autograd.grad(want.square().sum(), (*leaves, plain.weight))
    assert_close(mine[:2], theirs[:2], atol=1e-5, rtol=1e-5)
    assert_close(torch.cat(mine[2:], dim=1), theirs[2], atol=1e-5, rtol=1e-5)


def test_split_linear_starts_as_one_layer_of_the_joint_width() -> None:
    torch.manual_seed(0)
    split = SplitLinear(request_dim=24, candidate_dim=1, out_dim=200)
    for weight in (split.request.weight, split.candidate.weight, split.request.bias):
        assert 0.18 < weight.abs().max() <= 0.2  # 25 ** -0.5


def test_mlp_by_hand() -> None:
    mlp = MLP(in_dim=2, hidden=[2, 1])
    with torch.no_grad():
        mlp.layers[0].weight.copy_(torch.tensor([[1.0, 2.0], [-1.0, 0.0]]))
        mlp.layers[0].bias.copy_(torch.tensor([0.5, 0.0]))
        mlp.layers[2].weight.copy_(torch.tensor([[2.0, 7.0]]))
        mlp.layers[2].bias.copy_(torch.tensor([-1.0]))
    # relu([1 + 2 + 0.5, -1]) = [3.5, 0]; relu(7 - 1) = 6
    assert mlp(torch.tensor([[1.0, 1.0]])).tolist() == [[6.0]]
    assert mlp.out_dim == 1


def test_mlp_without_layers_is_the_identity() -> None:
    x = torch.randn(3, 2)
    mlp = MLP(in_dim=2, hidden=[])
    assert torch.equal(mlp(x), x)
    assert mlp.out_dim == 2


def test_mlp_normalises_before_the_activation() -> None:
    mlp = MLP(in_dim=3, hidden=[4], layer_norm=True, activation="tanh")
    x = torch.randn(5, 3)
    want = torch.tanh(nn.functional.layer_norm(mlp.layers[0](x), (4,)))
    assert_close(mlp(x), want)


def test_dropout_drops_in_training_only() -> None:
    torch.manual_seed(0)
    mlp = MLP(in_dim=3, hidden=[400], dropout=0.5, activation="tanh")
    x = torch.ones(1, 3)
    assert (mlp(x) == 0).float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert (mlp.eval()(x) != 0).all()


def test_split_mlp_equals_an_mlp_on_the_joint_vector() -> None:
    torch.manual_seed(0)
    split = SplitMLP(request_dim=3, candidate_dim=2, hidden=[4, 5], layer_norm=True, activation="gelu")
    request, candidate, owner = torch.randn(2, 3), torch.randn(3, 2), torch.tensor([0, 1, 1])
    first = torch.cat([split.first.request.weight, split.first.candidate.weight], dim=1)
    hidden = nn.functional.linear(torch.cat([request[owner], candidate], 1), first, split.first.request.bias)
    hidden = nn.functional.gelu(nn.functional.layer_norm(hidden, (4,)))
    want = nn.functional.gelu(nn.functional.layer_norm(split.rest.layers[0](hidden), (5,)))
    assert_close(split(request, candidate, owner), want)
    assert split.out_dim == 5


def test_concat_copies_only_what_it_must() -> None:
    x = torch.ones(2, 1)
    assert concat([x]) is x
    assert concat([x, 2 * x]).tolist() == [[1.0, 2.0], [1.0, 2.0]]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MLP(in_dim=0, hidden=[1]), "in_dim is 0; it must be at least 1"),
        (lambda: MLP(in_dim=1, hidden=[4, 0]), r"hidden\[1\] is 0; it must be at least 1"),
        (lambda: MLP(in_dim=1, hidden=[1], dropout=1.0), r"dropout is 1.0; it must lie in \[0, 1\)"),
        (lambda: MLP(in_dim=1, hidden=[1], activation="relo"), "activation is 'relo'; it must be one of relu, gelu"),
        (lambda: SplitLinear(request_dim=1, candidate_dim=0, out_dim=1), "candidate_dim is 0"),
        (lambda: SplitMLP(request_dim=1, candidate_dim=1, hidden=[]), "hidden is empty.*at least 1"),
    ],
)
def test_bad_arguments(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
