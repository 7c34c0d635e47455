"""Towers: each row by its own surface's tower, late vectors, empty slices, gradient routing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from components.names import surface_of
from components.towers import SharedTower, Towers, TowerTree

SURFACES, TASKS = ("hf", "sr", "rp"), ("click", "save")


def make(**arguments: Any) -> Towers:
    return Towers(surfaces=SURFACES, tasks=TASKS, in_dim=4, hidden=[6], late_dims={"sr": 3}, **arguments)


@settings(max_examples=20, deadline=None)
@given(counts=st.lists(st.integers(0, 3), min_size=3, max_size=3), per_task=st.booleans())
def test_each_row_goes_through_its_own_tower(counts: list[int], per_task: bool) -> None:
    towers, rows = make(), sum(counts)
    x, late = torch.randn(rows, 2 if per_task else 1, 4), torch.randn(counts[1], 3)
    names = [s for s, n in zip(SURFACES, counts, strict=True) for _ in range(n)]
    got = towers(x, counts, {"sr": late})
    assert got.shape == (rows, 2)
    for row, name in enumerate(names):
        tree = towers.trees[f"surface_{name}"]
        for t, task in enumerate(TASKS):
            seen = x[row, t if per_task else 0]
            if name == "sr":
                seen = torch.cat([seen, late[row - counts[0]]])
            first, head = tree.trunk.layers[0], tree.heads[f"task_{task}"]
            want = head.weight[0] @ torch.relu(first.weight @ seen + first.bias) + head.bias[0]
            assert_close(got[row, t], want, atol=1e-5, rtol=1e-4)


def test_only_the_rows_of_a_surface_are_computed() -> None:
    towers, seen = make(), {}
    for name, tree in towers.trees.items():
        tree.register_forward_hook(lambda _m, args, _o, name=name: seen.update({name: args[0].shape[0]}))
    towers(torch.randn(6, 1, 4), [1, 0, 5], {"sr": torch.zeros(0, 3)})
    assert seen == {"surface_hf": 1, "surface_sr": 0, "surface_rp": 5}


def test_an_empty_surface_takes_part_with_gradient_zero() -> None:
    towers = make(layer_norm=True)
    towers(torch.randn(3, 2, 4), [3, 0, 0], {"sr": torch.zeros(0, 3)}).square().sum().backward()
    for name, parameter in towers.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()) == (surface_of(name) == "hf"), name


def test_heads_learn_from_their_own_task_only() -> None:
    tree = TowerTree(tasks=TASKS, in_dim=4, hidden=[6])
    tree(torch.randn(3, 2, 4))[:, 1].sum().backward()
    assert not tree.heads["task_click"].weight.grad.any()
    assert tree.heads["task_save"].weight.grad.any()


def test_without_trunk_the_heads_read_the_input() -> None:
    tree, x = TowerTree(tasks=TASKS, in_dim=4, hidden=[]), torch.randn(3, 2, 4)
    assert_close(tree(x)[:, 1:], tree.heads["task_save"](x[:, 1]))


def test_shared_tower_ignores_surfaces() -> None:
    tower, x = SharedTower(tasks=TASKS, in_dim=4, hidden=[6]), torch.randn(3, 2, 4)
    assert torch.equal(tower(x, [3, 0, 0]), tower(x, [1, 1, 1]))
    assert torch.equal(tower(x, [3, 0, 0]), tower.tree(x))
    assert not any(surface_of(name) for name, _ in tower.named_parameters())


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: make(dropout=2.0), "dropout is 2.0"),
        (lambda: Towers(surfaces=["hf"], tasks=TASKS, in_dim=1, hidden=[], late_dims={"sr": 1}), r"\['sr'\].*\['hf'\]"),
        (lambda: TowerTree(tasks=[], in_dim=1, hidden=[]), "tasks must be one or more"),
        (lambda: TowerTree(tasks=TASKS, in_dim=1, hidden=[], late_dim=-1), "late_dim is -1; it must be at least 0"),
        (lambda: make()(torch.zeros(1, 1, 4), [0, 1, 0]), "late vector of width 3 and got 0"),
        (lambda: make()(torch.zeros(1, 1, 4), [0, 1, 0], {"sr": torch.zeros(1, 2)}), "width 3 and got 2"),
        (lambda: make()(torch.zeros(2, 1, 4), [0, 1, 0], {"sr": torch.zeros(1, 3)}), "add up to 1, not 2"),
        (
            lambda: SharedTower(tasks=TASKS, in_dim=4, hidden=[])(torch.zeros(1, 1, 4), [1], {"sr": torch.zeros(1, 1)}),
            r"no place for the late vectors of \['sr'\]",
        ),
    ],
)
def test_bad_arguments(run: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run()
