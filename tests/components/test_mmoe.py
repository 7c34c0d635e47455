"""Experts and gates against a loop, gradient routing, and the load measure."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from components.mmoe import MMoE, SharedBottom, gate_load
from components.names import surface_of

SURFACES, TASKS = ("hf", "sr", "rp"), ("click", "save")


def make(experts: int = 3) -> MMoE:
    return MMoE(surfaces=SURFACES, tasks=TASKS, in_dim=5, hidden=[6, 4], experts=experts)


def slow_mmoe(block: MMoE, x: Tensor, surface: str) -> Tensor:
    """One row [X] to [T, D], expert by expert."""
    outs = []
    for e in range(block.layers[0].weight.shape[0]):
        y = x
        for layer in block.layers:
            y = torch.relu(y @ layer.weight[e] + layer.bias[e, 0])
        outs.append(y)
    mixed = []
    for task in TASKS:
        gate = (block.gates[f"surface_{surface}"][f"task_{task}"].weight @ x).softmax(0)
        mixed.append(sum((g * y for g, y in zip(gate, outs, strict=True)), torch.zeros(4)))
    return torch.stack(mixed)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=3, max_size=3))
def test_equals_the_loop(counts: list[int]) -> None:
    block, x = make(), torch.randn(sum(counts), 5)
    names = [s for s, n in zip(SURFACES, counts, strict=True) for _ in range(n)]
    got = block(x, counts)
    assert got.shape == (sum(counts), 2, 4)
    for row, (x_row, name) in enumerate(zip(x, names, strict=True)):
        assert_close(got[row], slow_mmoe(block, x_row, name), atol=1e-5, rtol=1e-4)


def test_one_expert_is_a_perceptron() -> None:
    block, x = make(experts=1), torch.randn(3, 5)
    a, b = block.layers
    want = torch.relu(torch.relu(x @ a.weight[0] + a.bias[0]) @ b.weight[0] + b.bias[0])
    got = block(x, [1, 1, 1])
    assert_close(got, want.unsqueeze(1).expand(-1, 2, -1), atol=1e-6, rtol=1e-5)


def test_gates_learn_from_their_own_surface_and_task_only() -> None:
    block, x = make(), torch.randn(6, 5)
    block(x, [2, 3, 1])[2:5, 0].square().sum().backward()
    for name, parameter in block.gates.named_parameters():
        assert parameter.grad is not None
        mine = surface_of(name) == "sr" and "task_click" in name
        assert bool(parameter.grad.any()) == mine, name


def test_gate_weights_are_those_that_mix() -> None:
    block, x = make(), torch.randn(4, 5)
    gates = block.gate_weights(x, [1, 0, 3])
    assert_close(gates.sum(-1), torch.ones(4, 2))
    hidden = x
    for layer in block.layers:
        hidden = torch.relu(layer(hidden))
    assert_close(block(x, [1, 0, 3]), torch.einsum("cte,ced->ctd", gates, hidden), atol=1e-6, rtol=1e-5)


def test_load_by_hand() -> None:
    gates = torch.tensor([[[0.5, 0.5], [1.0, 0.0]], [[0.5, 0.5], [0.0, 1.0]]])
    load = gate_load(gates)
    assert_close(load.utilisation, torch.tensor([[0.5, 0.5], [0.5, 0.5]]))
    assert_close(load.entropy, torch.tensor([1.0, 0.0]))  # both use both; only the first mixes them
    quarter = gate_load(torch.tensor([[[0.25, 0.75]]])).entropy.item()
    assert quarter == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(2))
    assert gate_load(torch.zeros(0, 1, 2)).utilisation.tolist() == [[0.0, 0.0]]
    assert gate_load(torch.ones(3, 1, 1)).entropy.tolist() == [0.0]


def test_shared_bottom_gives_all_tasks_one_vector() -> None:
    block, x = SharedBottom(in_dim=5, hidden=[6, 4]), torch.randn(3, 5)
    assert_close(block(x, [3, 0, 0])[:, 0], block.mlp(x))
    assert block(x, [3, 0, 0]).shape == (3, 1, 4)
    assert block.out_dim == 4


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: make(experts=0), "experts is 0; it must be at least 1"),
        (lambda: MMoE(surfaces=[], tasks=TASKS, in_dim=1, hidden=[1], experts=1), "surfaces must be one or more"),
        (lambda: MMoE(surfaces=["a", "a"], tasks=TASKS, in_dim=1, hidden=[1], experts=1), r"got \['a', 'a'\]"),
        (lambda: MMoE(surfaces=SURFACES, tasks=TASKS, in_dim=1, hidden=[], experts=1), "hidden is empty"),
        (lambda: SharedBottom(in_dim=1, hidden=[]), "hidden is empty"),
        (lambda: make()(torch.zeros(3, 5), [1, 2]), "row counts of 2 surfaces; the module has 3"),
        (lambda: make()(torch.zeros(3, 5), [1, 1, 2]), r"row counts \[1, 1, 2\] add up to 4, not 3"),
    ],
)
def test_bad_arguments(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
