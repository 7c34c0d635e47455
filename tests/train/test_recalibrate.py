"""Biases fitted on held-out days: against SciPy, over ranks, and within a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, minimize_scalar
from torch import Tensor

from components.calibration import AffineMap, PiecewiseMap
from pipeline.config import DaysConfig
from pipeline.data.logs import Dataset
from pipeline.errors import ConfigError
from pipeline.train.build import CALIBRATION_KNOTS
from pipeline.train.recalibrate import LogitCollector, fit_map, intercept_shift
from pipeline.train.sharding import joined
from pipeline.train.trainer import Trainer
from tests.data.logs import write_log
from tests.train.runs import parameters, tiny_config


def rows(seed: int = 0, n: int = 500) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, 2, generator=generator).double() - 1
    labels = (torch.rand(n, 2, generator=generator) < torch.sigmoid(logits + torch.tensor([0.7, -0.4]))).double()
    weights = torch.rand(n, 2, generator=generator).double() * (torch.rand(n, 2, generator=generator) < 0.8)
    return logits, labels, weights


def same(values: Tensor) -> Tensor:
    return values


@pytest.mark.parametrize("prior", [0.05, 1.0, 100.0])
def test_it_is_the_maximum_that_scipy_finds(prior: float) -> None:
    logits, labels, weights = (v.numpy() for v in rows())
    got = intercept_shift(*rows(), prior=prior, total=same)
    for t in range(2):

        def loss(b: float, t: int = t) -> float:
            z = logits[:, t] + b
            entropy = np.logaddexp(0, z) - labels[:, t] * z
            return float((weights[:, t] * entropy).sum() + b**2 / (2 * prior**2))

        assert got[t].item() == pytest.approx(minimize_scalar(loss, bracket=(-1, 1), tol=1e-12).x, abs=1e-6)


def test_a_weak_prior_makes_predictions_add_up_and_a_strong_one_moves_nothing() -> None:
    logits, labels, weights = rows()
    free = intercept_shift(logits, labels, weights, prior=1e4, total=same)
    predicted = (weights * torch.sigmoid(logits + free)).sum(0)
    torch.testing.assert_close(predicted, (weights * labels).sum(0))
    assert intercept_shift(logits, labels, weights, prior=1e-4, total=same).abs().max() < 1e-4


def test_rows_on_two_ranks_count_as_on_one() -> None:
    whole = rows()
    parts = [tuple(v[start::2] for v in whole) for start in (0, 1)]
    # Both ranks hold the same shift, so the sum over ranks can be taken of what the other would compute.
    shift = torch.zeros(2, dtype=torch.float64)
    want = intercept_shift(*whole, prior=0.3, total=same)
    for _ in range(50):
        sums = []
        for logits, labels, weights in parts:
            p = torch.sigmoid(logits + shift)
            sums.append(torch.stack([(weights * (labels - p)).sum(0), (weights * p * (1 - p)).sum(0)]))
        gradient, curvature = sums[0] + sums[1]
        shift = shift + (gradient - shift / 0.3**2) / (curvature + 1 / 0.3**2)
    torch.testing.assert_close(shift, want)


def test_without_rows_nothing_moves_and_one_class_stays_finite() -> None:
    empty = torch.zeros(0, 1, dtype=torch.float64)
    assert intercept_shift(empty, empty, empty, prior=0.1, total=same).item() == 0
    ones = torch.ones(50, 1, dtype=torch.float64)
    assert 0 < intercept_shift(-3 * ones, ones, ones, prior=0.5, total=same).item() < 5


def two_ranks(values: Tensor) -> Tensor:
    """The sum over two ranks that hold the same rows."""
    return 2 * values


@pytest.mark.parametrize("prior", [0.1, 10.0])
def test_a_whole_map_is_the_maximum_that_scipy_finds(prior: float) -> None:
    logits, labels, weights = rows()
    of = AffineMap(tasks=2)
    with torch.no_grad():
        of.log_scale += torch.tensor([0.3, -0.2])
        of.bias += 0.1
    trained = torch.stack([of.log_scale, of.bias]).detach().double().numpy()
    fitted = fit_map(of, logits, labels, weights, prior=prior, total=same)
    assert of.bias.tolist() == pytest.approx([0.1, 0.1])  # what was given is left alone
    for t in range(2):

        def loss(x: np.ndarray, t: int = t) -> float:
            z = np.exp(x[0]) * logits[:, t].numpy() + x[1]
            entropy = np.logaddexp(0, z) - labels[:, t].numpy() * z
            away = ((x - trained[:, t]) ** 2).sum() / (2 * prior**2)
            return float((weights[:, t].numpy() * entropy).sum() + away)

        got = [fitted.log_scale[t].item(), fitted.bias[t].item()]
        assert got == pytest.approx(minimize(loss, trained[:, t], tol=1e-12).x, abs=1e-5)


def test_pieces_find_a_bend_and_stay_monotone() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(20_000, 1, generator=generator).double()
    bent = torch.where(logits < 0, 0.5 * logits, 2 * logits) - 0.5
    labels = (torch.rand(bent.shape, generator=generator) < torch.sigmoid(bent)).double()
    of = PiecewiseMap(tasks=1, knots=[-2.0, 0.0, 2.0])
    fitted = fit_map(of, logits, labels, torch.ones_like(labels), prior=10.0, total=same)
    assert fitted.log_slope.exp()[0, :2].tolist() == pytest.approx([0.5, 2], abs=0.2)
    grid = torch.linspace(-6, 6, 100).double().unsqueeze(1)
    assert (fitted(grid).diff(dim=0) > 0).all()


def test_a_whole_map_counts_rows_of_all_ranks() -> None:
    logits, labels, weights = rows()
    of = PiecewiseMap(tasks=2, knots=[-2.0, 0.0, 2.0])
    once = fit_map(of, logits, labels, 2 * weights, prior=0.3, total=same)
    both = fit_map(of, logits, labels, weights, prior=0.3, total=two_ranks)
    for a, b in zip(once.parameters(), both.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    empty = torch.zeros(0, 2, dtype=torch.float64)
    kept = fit_map(of, empty, empty, empty, prior=0.3, total=same)
    assert all(not p.any() for p in kept.parameters())


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_log(tmp_path_factory.mktemp("log") / "data", {"hf": 60, "sr": 40, "rp": 20})[0]


def test_a_run_moves_only_biases_once(dataset: Dataset, tmp_path: Path) -> None:
    plain = tiny_config(days=DaysConfig(validation=1, test=0))
    moved = replace(plain, recalibration_prior=5.0)
    with joined() as ranks:
        runs = {}
        for name, config in (("plain", plain), ("moved", moved)):
            trainer = Trainer(config, dataset, ranks, tmp_path / name)
            runs[name] = (parameters(trainer.train()), trainer.shifts)
        again = Trainer(moved, dataset, ranks, tmp_path / "moved")
        again.resume(sorted((tmp_path / "moved").iterdir())[-1])
        again.train()
    (before, none), (after, shifts) = runs["plain"], runs["moved"]
    assert none == {}
    assert set(shifts) == {"hf", "sr", "rp"}
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {n for n in before if ".calibration." in n and n.endswith("bias")}
    for surface, shift in shifts.items():
        name = next(n for n in changed if f"surface_{surface}." in n)
        np.testing.assert_allclose(after[name] - before[name], shift.numpy(), rtol=1e-4, atol=1e-6)
    assert again.shifts == {}


def test_a_run_fits_whole_maps_to_logits_before_calibration(dataset: Dataset, tmp_path: Path) -> None:
    monotone = replace(tiny_config().model, calibration="monotone")
    plain = tiny_config(days=DaysConfig(validation=1, test=0), model=monotone)
    moved = replace(plain, recalibration_prior=0.5, recalibrates="map")
    with joined() as ranks:
        runs, rows = {}, {}
        for name, config in (("plain", plain), ("moved", moved)):
            trainer = Trainer(config, dataset, ranks, tmp_path / name)
            runs[name] = parameters(trainer.train())
            rows[name] = LogitCollector(config.surfaces, calibrated=False)
            trainer.predict(trainer.days.validation, rows[name].add)
    changed = {name for name in runs["plain"] if not np.array_equal(runs["plain"][name], runs["moved"][name])}
    ours = {n for n in runs["plain"] if ".calibration." in n and not n.endswith("knots")}
    assert changed == ours
    for surface in plain.surfaces:
        before, after = (
            {n.rpartition(".")[2]: torch.from_numpy(run[n]) for n in ours if f"surface_{surface}." in n}
            for run in (runs["plain"], runs["moved"])
        )
        of = PiecewiseMap(tasks=2, knots=CALIBRATION_KNOTS)
        of.load_state_dict(before, strict=False)
        fitted = fit_map(of, *rows["plain"].rows((surface,), 2), prior=0.5, total=same)
        for name in ("bias", "log_slope"):
            torch.testing.assert_close(after[name], fitted.get_parameter(name).detach().float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"recalibration_prior": 0.0, "days": DaysConfig()}, "must be above 0"),
        ({"recalibration_prior": 0.1, "days": DaysConfig(validation=0)}, "no day to fit it on"),
        (
            {
                "recalibration_prior": 0.1,
                "days": DaysConfig(),
                "model": replace(tiny_config().model, calibration="none"),
            },
            "no bias to move",
        ),
    ],
)
def test_what_is_refused(changes: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        tiny_config(**changes)
