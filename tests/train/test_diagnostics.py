"""Gate load and gradient conflict against plain loops on a tiny model."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from components.mmoe import MMoE
from components.names import surface_of
from pipeline.config import LoaderConfig, MixtureConfig
from pipeline.data.batch import Batch
from pipeline.data.loader import Loader
from pipeline.errors import ConfigError
from pipeline.train.build import build_task
from pipeline.train.diagnostics import gate_utilisation, gradient_conflict, shared_parameters, surface_gradients
from pipeline.train.model_plan import model_plan
from pipeline.train.task import TrainTask
from tests.data.logs import write_log
from tests.train.runs import tiny_config

MOMENTS = dict.fromkeys(("hour", "price", "match"), (0.0, 1.0))


def made(tmp_path: Path, kind: str = "mmoe", requests: int = 20) -> tuple[TrainTask, list[Batch]]:
    dataset = write_log(tmp_path / "data", {"hf": 30, "sr": 20, "rp": 10})[0]
    model = replace(tiny_config().model, mixture=MixtureConfig(kind=kind, experts=3, hidden=(8,)))  # type: ignore[arg-type]
    plan = model_plan(tiny_config(model=model), dataset.schema, MOMENTS)
    torch.manual_seed(0)
    task = build_task(plan, table_device=torch.device("cpu"))
    loader = Loader(dataset, plan.layout, LoaderConfig(requests_per_batch=requests), days=None, seed=0)
    return task, list(loader.batches(0))


def test_each_surface_has_the_load_that_its_gates_give(tmp_path: Path) -> None:
    task, batches = made(tmp_path)
    mixture = task.model.body.mixture
    assert isinstance(mixture, MMoE)
    with torch.no_grad():
        for parameter in mixture.gates["surface_sr"].parameters():
            parameter.zero_()
    found = gate_utilisation(task, batches)
    assert set(found) == {"hf", "sr", "rp"}
    torch.testing.assert_close(found["sr"].utilisation, torch.full((2, 3), 1 / 3))
    torch.testing.assert_close(found["sr"].entropy, torch.ones(2))
    assert (found["hf"].entropy < 1).all()
    torch.testing.assert_close(found["hf"].utilisation.sum(1), torch.ones(2))
    assert not mixture._forward_pre_hooks


def test_gradients_are_those_of_one_surfaces_loss(tmp_path: Path) -> None:
    task, batches = made(tmp_path)
    batch = batches[0]
    logits = task.model(batch.inputs).logits
    first, second = batch.inputs.candidates_per_surface[:2]
    rows = slice(first, first + second)
    loss = torch.zeros(())
    for t in range(2):
        keep = batch.label_mask[rows, t]
        entropy = F.binary_cross_entropy_with_logits(
            logits[rows, t][keep], batch.labels[rows, t][keep], weight=batch.weights[rows][keep], reduction="sum"
        )
        loss = loss + entropy / batch.weights[rows][keep].sum()
    loss.backward()
    want = torch.cat(
        [
            (p.grad if p.grad is not None else torch.zeros_like(p)).flatten()
            for n, p in task.named_parameters()
            if n in shared_parameters(task)
        ]
    )
    torch.testing.assert_close(surface_gradients(task, batch)["sr"], want, rtol=1e-4, atol=1e-7)


def test_shared_parameters_are_dense_and_of_no_surface(tmp_path: Path) -> None:
    task, _ = made(tmp_path)
    names = set(shared_parameters(task))
    assert names
    assert not [n for n in names if surface_of(n) is not None or "embedding_bags" in n or "calibration" in n]


def test_conflict_of_pairs(tmp_path: Path) -> None:
    task, batches = made(tmp_path, requests=6)
    found = gradient_conflict(task, batches)
    assert set(found) == {("hf", "sr"), ("hf", "rp"), ("sr", "rp")}
    gradients = [surface_gradients(task, b) for b in batches]
    both = [g for g in gradients if "hf" in g and "rp" in g]
    cosines = [float(F.cosine_similarity(g["hf"], g["rp"], dim=0)) for g in both]
    got = found["hf", "rp"]
    assert got.mean_cosine == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)
    assert got.opposed == sum(c < 0 for c in cosines) / len(cosines)
    hf, rp = (torch.stack([g[s] for g in gradients if s in g]).sum(0) for s in ("hf", "rp"))
    assert got.cosine == pytest.approx(float(F.cosine_similarity(hf, rp, dim=0)), abs=1e-5)
    # The interval by hand: the cosine with each batch left out, on Fisher's scale.
    pairs = [(g.get("hf", torch.zeros_like(hf)), g.get("rp", torch.zeros_like(rp))) for g in gradients]
    z = [math.atanh(float(F.cosine_similarity(hf - a, rp - b, dim=0))) for a, b in pairs]
    error = math.sqrt((len(z) - 1) * statistics.pvariance(z))
    assert got.cosine_interval == pytest.approx(
        [math.tanh(math.atanh(got.cosine) + side * 1.959964 * error) for side in (-1, 1)], abs=1e-4
    )
    # Of a mean, on the plain scale, the jackknife is the standard error; cosines this small hardly feel Fisher's.
    half = 1.959964 * statistics.stdev(cosines) / math.sqrt(len(cosines))
    assert got.mean_cosine_interval is not None
    assert math.dist([got.mean_cosine - half, got.mean_cosine + half], got.mean_cosine_interval) < 0.2 * half
    assert got.norm_ratio == pytest.approx(float(hf.norm() / rp.norm()), rel=1e-4)


def test_few_batches_give_no_interval(tmp_path: Path) -> None:
    task, batches = made(tmp_path)
    found = gradient_conflict(task, batches)["hf", "sr"]
    assert (len(batches), found.cosine_interval, found.mean_cosine_interval) == (3, None, None)


def test_a_model_without_gates_is_refused(tmp_path: Path) -> None:
    task, batches = made(tmp_path, kind="none")
    with pytest.raises(ConfigError, match=r"set model\.mixture\.kind to mmoe"):
        gate_utilisation(task, batches)
