"""What a run says of its steps, by value; the guard against NaN; the profiler's trace."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torchrec import KeyedJaggedTensor

from components.mmoe import MMoE
from pipeline.data.logs import Dataset
from pipeline.train import clock as clocks
from pipeline.train.clock import PARTS, StepClock
from pipeline.train.gates import GateWatch
from pipeline.train.observe import NonFiniteLossError, SeenStep, gradient_norm, rates_of, unique_share
from pipeline.train.sharding import joined
from pipeline.train.trainer import Trainer
from tests.train.runs import Recorder, tiny_config

CPU = torch.device("cpu")


def test_the_clock_is_in_one_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: now[0])
    clock = StepClock(CPU)

    def after(seconds: float) -> None:
        now[0] += seconds

    after(1)
    with clock.during("wait"):
        after(2)
    after(4)
    clock.switch("forward")
    after(8)
    with clock.during("exchange"):
        after(16)
    after(32)
    assert clock.read() == dict.fromkeys(PARTS, 0.0) | {"other": 5, "wait": 2, "forward": 40, "exchange": 16}
    after(64)
    assert clock.read() == dict.fromkeys(PARTS, 0.0) | {"forward": 64}


def test_unique_share_by_key() -> None:
    ids = KeyedJaggedTensor(
        keys=["user", "item", "none"],
        values=torch.tensor([7, 7, 1, 2, 3, 3]),
        lengths=torch.tensor([1, 1, 1, 3, 0, 0]),
    )
    assert unique_share(ids) == {"user": 0.5, "item": 0.75}


def test_gradient_norm_is_that_of_all_gradients_together() -> None:
    a, b, unused = (nn.Parameter(torch.zeros(n)) for n in (2, 1, 3))
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert float(gradient_norm([a, b, unused])) == 5.0
    assert float(gradient_norm([unused])) == 0.0


def test_gates_are_watched_on_demand() -> None:
    torch.manual_seed(0)
    mixture = MMoE(surfaces=["hf", "sr"], tasks=["click"], in_dim=3, hidden=[2], experts=2)
    watch, rows = GateWatch(mixture), torch.randn(5, 3)
    mixture(rows, [2, 3])
    assert watch.metrics() == {}
    watch.watching = True
    mixture(rows, [2, 3])
    seen = watch.metrics()
    gates = mixture.gate_weights(rows, [2, 3]).detach()
    assert seen["train/gates/hf/click/expert_0"] == pytest.approx(float(gates[:2, 0, 0].mean()))
    assert seen["train/gates/sr/click/expert_1"] == pytest.approx(float(gates[2:, 0, 1].mean()))
    assert 0 < seen["train/gates/sr/click/entropy"] <= 1
    assert watch.metrics() == {}
    watch.close()
    mixture(rows, [2, 3])
    assert watch.take() == {}


def test_a_bad_batch_is_told_apart_by_surface_and_request() -> None:
    step = SeenStep(
        epoch=1,
        step=9,
        losses=torch.tensor([0.5, float("nan"), 0.25, float("inf")]),
        finite_C=torch.tensor([True, True, False, True]),
        request_id=torch.tensor([11, 12, 21]),
        request_of_candidate=torch.tensor([0, 1, 1, 2]),
        requests_per_surface=(2, 1, 0),
    )
    assert step.identity(tiny_config(), rank=3) == {
        "epoch": 1,
        "step": 9,
        "rank": 3,
        "losses": {"click/loss": 0.5, "save/loss": "nan", "click/calibrated_loss": 0.25, "save/calibrated_loss": "inf"},
        "requests": {"hf": [11, 12], "sr": [21], "rp": []},
        "requests_without_finite_score": {"hf": [12], "sr": [], "rp": []},
    }


class Poison(Recorder):
    """Makes a parameter NaN after step 2."""

    trainer: Trainer

    def progress(self, *, epoch: int, step: int, steps: int, metrics: dict[str, float]) -> None:
        super().progress(epoch=epoch, step=step, steps=steps, metrics=metrics)
        if step == 2:
            with torch.no_grad():
                self.trainer.window.dense[0].fill_(torch.nan)


def test_nan_stops_the_run_and_names_the_batch(log: Path, tmp_path: Path) -> None:
    reporter = Poison()
    config = tiny_config(checkpoint=replace(tiny_config().checkpoint, steps=3))
    with joined() as ranks:
        trainer = Trainer(config, Dataset.open(log), ranks, tmp_path / "checkpoints", reporter)
        reporter.trainer = trainer
        third = list(trainer.loader.batches(0))[2]
        with pytest.raises(NonFiniteLossError, match="at step 3 of epoch 0: no request of hf has a finite") as raised:
            trainer.train()
        trainer.writer.finish()
    path = tmp_path / "not_finite_rank_0.json"
    assert str(path) in str(raised.value)
    written = json.loads(path.read_text())
    assert [i for ids in written["requests"].values() for i in ids] == third.request_id.tolist()
    assert written["losses"]["click/loss"] == "nan"
    assert not list((tmp_path / "checkpoints").glob("epoch-0-step-*3")), "what went bad is not saved"


def test_reports_hold_every_part_of_a_step(log: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    with joined() as ranks:
        trainer = Trainer(tiny_config(log_steps=2), Dataset.open(log), ranks, tmp_path / "checkpoints", recorder)
        trainer.train()
    for report in recorder.steps:
        parts = {p: report[f"train/step_seconds/{p}"] for p in PARTS}
        assert sum(parts.values()) == pytest.approx(report["train/step_seconds"], rel=0.05)
        assert all(parts[p] > 0 for p in ("lookup", "forward", "backward", "optimizer"))
        assert report["train/gradient_norm"] > 0
        for surface in ("hf", "sr", "rp"):
            experts = [report[f"train/gates/{surface}/click/expert_{e}"] for e in range(2)]
            assert sum(experts) == pytest.approx(1, abs=1e-5)
        assert 0 < report["train/unique_ids/history_item"] <= 1
        assert report["train/memory_bytes/host"] > 2**20
    last = recorder.steps[-1]
    assert rates_of(last).startswith(f"{last['train/impressions_per_second']:,.0f} impressions/s (")
    assert trainer.total_steps == last["step"]


def test_asked_steps_are_traced(log: Path, tmp_path: Path) -> None:
    with joined() as ranks:
        trainer = Trainer(
            tiny_config(), Dataset.open(log), ranks, tmp_path / "checkpoints", Recorder(), profile_steps=(2, 3)
        )
        trainer.train()
    with gzip.open(tmp_path / "traces" / "rank-0-steps-2-3.json.gz") as trace:
        names = [e.get("name", "") for e in json.load(trace)["traceEvents"]]
    assert len({n for n in names if n.startswith("## forward")}) == 2
    assert "Self CPU" in (tmp_path / "traces" / "rank-0-steps-2-3.txt").read_text()
