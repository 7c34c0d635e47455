"""PLE, STAR and residual towers against loops over rows, and whose rows teach which parameter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from components.names import keep_surfaces, surface_of
from components.ple import PLE, Experts
from components.residual_towers import ResidualTowers
from components.star import StarTowers
from components.towers import Towers

SURFACES, TASKS = ("hf", "sr", "rp"), ("click", "save")
COUNTS = st.lists(st.integers(0, 3), min_size=3, max_size=3)


def names_of(counts: list[int]) -> list[str]:
    return [s for s, n in zip(SURFACES, counts, strict=True) for _ in range(n)]


def ple(levels: int = 2) -> PLE:
    return PLE(surfaces=SURFACES, tasks=TASKS, in_dim=5, hidden=[6, 4], own=2, shared=1, levels=levels)


def slow_experts(block: Experts, x: Tensor) -> list[Tensor]:
    outs = []
    for e in range(block.layers[0].weight.shape[0]):
        y = x
        for layer in block.layers:
            y = torch.relu(y @ layer.weight[e] + layer.bias[e, 0])
        outs.append(y)
    return outs


def slow_ple(block: PLE, x: Tensor, surface: str) -> Tensor:
    """One row [X] to [T, D], expert by expert, level by level."""
    own, shared = x, x
    for level in block.levels:
        experts = torch.stack(slow_experts(level.own[f"surface_{surface}"], own) + slow_experts(level.shared, shared))
        gates = level.gates[f"surface_{surface}"]
        mixed = torch.stack([(gate.weight @ own).softmax(0) @ experts for gate in gates.values()])
        if level.shared_gate is None:
            return mixed
        own, shared = mixed[0], (level.shared_gate.weight @ shared).softmax(0) @ experts
    raise AssertionError("no last level")


@settings(max_examples=15, deadline=None)
@given(COUNTS, st.integers(1, 3))
def test_ple_equals_the_loop(counts: list[int], levels: int) -> None:
    block, x = ple(levels), torch.randn(sum(counts), 5)
    got = block(x, counts)
    assert got.shape == (sum(counts), 2, 4)
    for row, x_row, name in zip(got, x, names_of(counts), strict=True):
        assert_close(row, slow_ple(block, x_row, name), atol=1e-5, rtol=1e-4)


def star() -> StarTowers:
    towers = StarTowers(surfaces=SURFACES, tasks=TASKS, in_dim=5, hidden=[6, 4], auxiliary=[3])
    with torch.no_grad():
        for name, parameter in towers.named_parameters():
            if surface_of(name) is not None:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return towers


def slow_star(towers: StarTowers, x: Tensor, surface: str, mean: Tensor, var: Tensor) -> Tensor:
    """One row [X] to [T]."""
    key = f"surface_{surface}"
    norm = towers.norm
    h = (norm.scale * norm.own[key].weight) * (x - mean) / (var + 1e-5).sqrt() + norm.shift + norm.own[key].bias
    for layer in towers.layers:
        weight = layer.shared.weight * layer.own[key].weight
        h = torch.relu(weight @ h + layer.shared.bias + layer.own[key].bias)
    heads = [
        ((head.shared.weight * head.own[key].weight) @ h + head.shared.bias + head.own[key].bias)[0]
        for head in towers.heads.values()
    ]
    return torch.stack(heads) + towers.auxiliary_head(towers.auxiliary(x))


def test_star_equals_the_loop_with_moments_of_the_surfaces_rows() -> None:
    towers, counts, x = star(), [4, 3, 2], torch.randn(9, 1, 5)
    got = towers(x, counts)
    start = 0
    for surface, n in zip(SURFACES, counts, strict=True):
        rows = x[start : start + n, 0]
        mean, var = rows.mean(0), rows.var(0, unbiased=False)
        for i in range(n):
            assert_close(got[start + i], slow_star(towers, rows[i], surface, mean, var), atol=1e-5, rtol=1e-4)
        start += n


def test_star_scores_by_running_moments_one_row_like_many() -> None:
    towers = star()
    for _ in range(3):
        towers(2 + torch.randn(30, 1, 5), [10, 10, 10])
    towers.eval()
    x = torch.randn(3, 1, 5)
    whole = towers(x, [0, 3, 0])
    assert_close(whole, torch.cat([towers(row[None], [0, 1, 0]) for row in x]))
    norm = towers.norm.own["surface_sr"]
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert_close(whole[0], slow_star(towers, x[0, 0], "sr", norm.running_mean, norm.running_var), atol=1e-5, rtol=1e-4)


def test_star_takes_a_single_row_and_none_while_training() -> None:
    towers = star()
    got = towers(torch.randn(2, 1, 5), [1, 0, 1])
    got.sum().backward()
    assert torch.isfinite(got).all()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in towers.parameters())


def test_a_star_starts_as_its_shared_network() -> None:
    towers = StarTowers(surfaces=SURFACES, tasks=TASKS, in_dim=5, hidden=[6]).eval()
    x = torch.randn(1, 1, 5)
    assert_close(towers(x, [1, 0, 0]), towers(x, [0, 0, 1]))


def test_residual_towers_are_the_sum_and_start_as_the_shared_one() -> None:
    towers = ResidualTowers(surfaces=SURFACES, tasks=TASKS, in_dim=5, hidden=[6], late_dims={"sr": 2})
    x, late, counts = torch.randn(6, 2, 5), {"sr": torch.randn(3, 2)}, [2, 3, 1]
    assert torch.equal(towers(x, counts, late), towers.shared(x, counts))
    for parameter in towers.own.parameters():
        nn.init.normal_(parameter)
    plain = Towers(surfaces=SURFACES, tasks=TASKS, in_dim=5, hidden=[6], late_dims={"sr": 2})
    plain.load_state_dict(towers.own.state_dict())
    assert_close(towers(x, counts, late), towers.shared(x, counts) + plain(x, counts, late))


@pytest.mark.parametrize("kind", ["ple", "star", "residual"])
def test_a_surface_teaches_its_own_and_the_shared_parameters_only(kind: str) -> None:
    x = torch.randn(6, 5)
    if kind == "ple":
        block: nn.Module = ple()
        out = block(x, [0, 6, 0])
    else:
        block = star() if kind == "star" else ResidualTowers(surfaces=SURFACES, tasks=TASKS, in_dim=5, hidden=[6])
        out = block(x.unsqueeze(1), [0, 6, 0])
    F.softplus(out).sum().backward()
    for name, parameter in block.named_parameters():
        taught = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        if surface_of(name) in ("hf", "rp"):
            assert not taught, name
    assert any(
        surface_of(n) == "sr" and p.grad is not None and p.grad.abs().sum() > 0 for n, p in block.named_parameters()
    )
    assert any(
        surface_of(n) is None and p.grad is not None and p.grad.abs().sum() > 0 for n, p in block.named_parameters()
    )


def test_pruned_to_one_surface_the_rest_scores_alike() -> None:
    x = torch.randn(4, 5)
    whole, one = ple(), PLE(surfaces=["sr"], tasks=TASKS, in_dim=5, hidden=[6, 4], own=2, shared=1)
    one.load_state_dict(keep_surfaces(whole.state_dict(), keep=["sr"]))
    assert_close(one(x, [4]), whole(x, [0, 4, 0]))
    stars, star_one = star().eval(), StarTowers(surfaces=["sr"], tasks=TASKS, in_dim=5, hidden=[6, 4], auxiliary=[3])
    star_one.load_state_dict(keep_surfaces(stars.state_dict(), keep=["sr"]))
    assert_close(star_one.eval()(x[:, None], [4]), stars(x[:, None], [0, 4, 0]))


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 layer"):
        PLE(surfaces=SURFACES, tasks=TASKS, in_dim=5, hidden=[])
    with pytest.raises(ValueError, match="levels is 0"):
        PLE(surfaces=SURFACES, tasks=TASKS, in_dim=5, hidden=[4], levels=0)
    with pytest.raises(ValueError, match="at least 1 layer"):
        StarTowers(surfaces=SURFACES, tasks=TASKS, in_dim=5, hidden=[])
    with pytest.raises(ValueError, match="one vector a row, got 2"):
        star()(torch.randn(3, 2, 5), [1, 1, 1])
    with pytest.raises(ValueError, match="no place for the late vectors of \\['sr'\\]"):
        star()(torch.randn(3, 1, 5), [1, 1, 1], {"sr": torch.randn(1, 2)})
