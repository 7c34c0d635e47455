"""EPNet: its formula, the stopped gradient, and surfaces kept apart."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from components.gating import EPNet


def test_formula_row_by_row() -> None:
    gate, x = EPNet(surfaces=["hf", "sr"], in_dim=3, hidden=4, surface_dim=2), torch.randn(4, 3)
    surfaces = [1, 0, 0, 1]
    got = gate(x, torch.tensor(surfaces))
    first, _, last = gate.mlp
    for row, s in enumerate(surfaces):
        vector = gate.surface.vectors["surface_hf" if s == 0 else "surface_sr"]
        hidden = torch.relu(first.weight @ torch.cat([vector, x[row]]) + first.bias)
        assert_close(got[row], 2 / (1 + torch.exp(-(last.weight @ hidden + last.bias))) * x[row])


def test_the_gate_sends_no_gradient_to_what_it_reads() -> None:
    gate, x = EPNet(surfaces=["hf"], in_dim=3, hidden=4), torch.randn(2, 3, requires_grad=True)
    got = gate(x, torch.zeros(2, dtype=torch.int64))
    got.sum().backward()
    assert_close(x.grad, (got / x).detach())  # the product's other factor and nothing more


def test_a_surface_trains_its_own_vector_only() -> None:
    gate = EPNet(surfaces=["hf", "sr"], in_dim=3, hidden=4)
    gate(torch.randn(2, 3), torch.tensor([1, 1])).sum().backward()
    assert not gate.surface.vectors["surface_hf"].grad.any()
    assert gate.surface.vectors["surface_sr"].grad.any()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="hidden is 0; it must be at least 1"):
        EPNet(surfaces=["hf"], in_dim=3, hidden=0)
    with pytest.raises(ValueError, match="dim is 0; it must be at least 1"):
        EPNet(surfaces=["hf"], in_dim=3, hidden=1, surface_dim=0)
