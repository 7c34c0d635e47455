"""Calibration: identity at first, increasing always, detached, each surface by its own map, and it calibrates."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from components.calibration import GlobalCalibration, IdentityCalibration, PiecewiseMap, SurfaceCalibration

SURFACES, TASKS = ("hf", "sr", "rp"), ("click", "save")
KNOTS = [-4.0, -2.0, 0.0, 2.0]
ALL = {
    "surface affine": lambda: SurfaceCalibration(surfaces=SURFACES, tasks=TASKS),
    "surface piecewise": lambda: SurfaceCalibration(surfaces=SURFACES, tasks=TASKS, knots=KNOTS),
    "global affine": lambda: GlobalCalibration(tasks=TASKS),
    "global piecewise": lambda: GlobalCalibration(tasks=TASKS, knots=KNOTS),
    "identity": IdentityCalibration,
}


@pytest.mark.parametrize("kind", ALL)
def test_starts_as_the_identity_and_sends_no_gradient_back(kind: str) -> None:
    block, logits = ALL[kind](), (torch.randn(7, 2) * 5).requires_grad_()
    got = block(logits, [3, 0, 4])
    assert_close(got, logits.detach(), atol=1e-5, rtol=1e-5)
    assert got.requires_grad == (kind != "identity")
    if got.requires_grad:
        got.sum().backward()
    assert logits.grad is None


def test_affine_by_hand() -> None:
    block = SurfaceCalibration(surfaces=["hf", "sr"], tasks=TASKS)
    with torch.no_grad():
        block.maps["surface_sr"].log_scale.copy_(torch.tensor([math.log(2.0), 0.0]))
        block.maps["surface_sr"].bias.copy_(torch.tensor([0.5, -1.0]))
    got = block(torch.tensor([[1.0, 1.0], [1.0, 1.0]]), [1, 1])
    assert_close(got, torch.tensor([[1.0, 1.0], [2.5, 0.0]]))


def test_piecewise_by_hand() -> None:
    block = PiecewiseMap(tasks=1, knots=[0.0, 1.0, 3.0])
    with torch.no_grad():
        block.log_slope.copy_(torch.tensor([[1.0, 2.0, 0.5]]).log())
        block.bias.fill_(10.0)
    # slope 1 up to 1, 2 from there to 3, 0.5 above
    got = block(torch.tensor([[-2.0], [0.0], [1.0], [2.0], [3.0], [5.0]])).flatten()
    assert_close(got, torch.tensor([8.0, 10.0, 11.0, 13.0, 15.0, 16.0]))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), piecewise=st.booleans())
def test_never_changes_the_order(seed: int, piecewise: bool) -> None:
    torch.manual_seed(seed)
    block = SurfaceCalibration(surfaces=["hf"], tasks=["click"], knots=KNOTS if piecewise else None)
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    logits = torch.linspace(-8, 8, 60).unsqueeze(1)
    assert (block(logits, [60]).diff(dim=0) > 0).all()


def test_a_surface_trains_its_own_map_only() -> None:
    block = SurfaceCalibration(surfaces=SURFACES, tasks=TASKS, knots=KNOTS)
    block(torch.randn(5, 2), [0, 5, 0])[:, 0].sum().backward()
    for surface in SURFACES:
        grad = block.maps[f"surface_{surface}"].bias.grad
        assert grad.tolist() == ([5.0, 0.0] if surface == "sr" else [0.0, 0.0])


@pytest.mark.parametrize("knots", [None, KNOTS])
def test_learns_the_rate_of_each_surface(knots: list[float] | None) -> None:
    block = SurfaceCalibration(surfaces=["hf", "sr"], tasks=["click"], knots=knots)
    logits = torch.randn(4000, 1)
    labels = torch.bernoulli(torch.sigmoid(torch.cat([logits[:2000] * 0.5 - 1.0, logits[2000:] + 1.0])))
    optimizer = torch.optim.LBFGS(block.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(block(logits, [2000, 2000]), labels)
        loss.backward()
        return loss

    optimizer.step(step)
    rates = block(logits, [2000, 2000]).sigmoid()
    for rows in (slice(0, 2000), slice(2000, 4000)):
        assert_close(rates[rows].mean(), labels[rows].mean(), atol=3e-3, rtol=0)
    if knots is None:
        assert block.maps["surface_hf"].log_scale.exp().item() == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SurfaceCalibration(surfaces=[], tasks=TASKS), "surfaces must be one or more"),
        (lambda: GlobalCalibration(tasks=["a", "a"]), r"tasks must be .* got \['a', 'a'\]"),
        (lambda: GlobalCalibration(tasks=TASKS, knots=[1.0]), "got 1 knots; a piecewise map needs at least 2"),
        (lambda: GlobalCalibration(tasks=TASKS, knots=[1.0, 0.5]), "knots have 1.0 before 0.5; they must rise"),
        (lambda: ALL["surface affine"]()(torch.zeros(2, 2), [1, 1]), "counts of 2 surfaces; the module has 3"),
    ],
)
def test_bad_arguments(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
