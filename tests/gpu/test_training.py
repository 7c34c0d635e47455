"""A run on a GPU learns what the same run learns on CPU, and goes on where it was stopped."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config import (
    CheckpointConfig,
    ComputeConfig,
    HistoryConfig,
    MixtureConfig,
    RunConfig,
    ShardingConfig,
)
from pipeline.data.logs import Dataset
from pipeline.errors import ConfigError
from pipeline.recipes import find
from tests.distributed.ranks import run_ranks
from tests.train.runs import parameters, predictions, tiny_config, train

Result = dict[str, Any]
FLOAT32 = ComputeConfig(tf32=False)


def config(**changes: Any) -> RunConfig:
    """The tiny run in full float32, with a checkpoint every other step."""
    return replace(tiny_config(compute=FLOAT32, checkpoint=CheckpointConfig(steps=2, keep_newest=99)), **changes)


def on_cpu(run: RunConfig, data: Path, folder: Path, resume: Path | None = None) -> Result:
    """The same run as on a machine without a GPU."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: False)
        return train(run, data, folder, resume)


def assert_equal(one: Result, other: Result) -> None:
    """The same losses, parameters and predictions, bit for bit."""
    assert one["losses"] == other["losses"]
    assert one["predictions"] == other["predictions"]
    mine, theirs = parameters(one["checkpoint"]), parameters(other["checkpoint"])
    for name, value in mine.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def assert_close(one: Result, other: Result, *, rtol: float = 1e-4, atol: float = 1e-4) -> None:
    """The same losses and predictions but for rounding."""
    np.testing.assert_allclose(one["losses"], other["losses"], rtol=rtol)
    mine, theirs = predictions([one]), predictions([other])
    assert mine.keys() == theirs.keys()
    np.testing.assert_allclose([mine[k] for k in theirs], [theirs[k] for k in theirs], atol=atol)


@pytest.fixture(scope="module")
def usual(log: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The undisturbed run on the GPU."""
    folder = tmp_path_factory.mktemp("gpu")
    return folder, train(config(), log.root, folder)


def test_a_run_on_a_gpu_is_the_run_on_cpu(log: Dataset, usual: tuple[Path, Result], tmp_path: Path) -> None:
    expected = on_cpu(config(), log.root, tmp_path)
    assert len(expected["losses"]) > 5
    assert_close(usual[1], expected)
    theirs = parameters(expected["checkpoint"])
    for name, value in parameters(usual[1]["checkpoint"]).items():
        np.testing.assert_allclose(value, theirs[name], rtol=2e-3, atol=2e-5, err_msg=name)


def test_two_runs_on_a_gpu_are_equal(log: Dataset, usual: tuple[Path, Result], tmp_path: Path) -> None:
    assert_equal(train(config(), log.root, tmp_path), usual[1])


def test_a_resumed_run_ends_as_the_undisturbed_one(log: Dataset, usual: tuple[Path, Result], tmp_path: Path) -> None:
    resumed = train(config(), log.root, tmp_path, resume=usual[0] / "epoch-0-step-00000002")
    assert_equal({**resumed, "losses": usual[1]["losses"][:2] + resumed["losses"]}, usual[1])


def test_a_checkpoint_moves_between_devices(log: Dataset, usual: tuple[Path, Result], tmp_path: Path) -> None:
    cpu = on_cpu(config(), log.root, tmp_path / "cpu", resume=usual[0] / "epoch-0-step-00000002")
    back = train(config(), log.root, tmp_path / "gpu", resume=tmp_path / "cpu" / "epoch-0-step-00000004")
    for found, done in ((cpu, 2), (back, 4)):
        assert_close({**found, "losses": usual[1]["losses"][:done] + found["losses"]}, usual[1])


@pytest.mark.parametrize(
    ("kernel", "prefetch"), [("fused_uvm", False), ("fused_uvm_caching", False), ("fused_uvm_caching", True)]
)
def test_tables_in_host_memory_train_as_those_on_the_device(
    log: Dataset, usual: tuple[Path, Result], tmp_path: Path, kernel: str, prefetch: bool
) -> None:
    sharding = ShardingConfig(kernels=(kernel,), prefetch=prefetch)
    found = train(config(sharding=sharding), log.root, tmp_path)
    assert_close(found, usual[1])


def test_one_table_of_several_may_be_prefetched(
    log: Dataset, usual: tuple[Path, Result], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sharding = ShardingConfig(table_kernels={"item": ("fused_uvm_caching",)}, prefetch=True)
    with caplog.at_level(logging.ERROR):
        found = train(config(sharding=sharding), log.root, tmp_path)
    # TorchRec says so where a table is handed batches ahead that does not know of it.
    assert "prefetch_pipeline" not in caplog.text
    assert_close(found, usual[1])


@pytest.mark.parametrize("sharding", ["row_wise", "data_parallel", "column_wise"])
def test_every_way_a_table_may_lie(log: Dataset, usual: tuple[Path, Result], tmp_path: Path, sharding: str) -> None:
    optimizer = replace(config().optimizer, sparse="adagrad")
    tables = {"item": (sharding,)} if sharding != "data_parallel" else {"country": (sharding,)}
    found = train(
        config(optimizer=optimizer, sharding=ShardingConfig(tables=tables, min_partition={"item": 4})),
        log.root,
        tmp_path / "so",
    )
    assert_close(found, train(config(optimizer=optimizer), log.root, tmp_path / "usual"))


def test_fused_adam_learns(log: Dataset, tmp_path: Path) -> None:
    """FBGEMM has it on CUDA alone."""
    optimizer = replace(config().optimizer, sparse="adam", sparse_lr=0.01)
    losses = np.array(train(config(optimizer=optimizer, epochs=4), log.root, tmp_path)["losses"])
    assert losses[-3:].mean() < 0.97 * losses[:3].mean()


CHANGES: dict[str, Callable[[RunConfig], RunConfig]] = {
    "unpipelined": lambda c: replace(c, sharding=ShardingConfig(pipeline=False)),
    "micro_batches": lambda c: replace(c, compute=replace(FLOAT32, micro_batches=3)),
    "compiled": lambda c: replace(c, compute=replace(FLOAT32, compile=True)),
}
ROUNDED: dict[str, ComputeConfig] = {"tf32": ComputeConfig(), "bf16": ComputeConfig(bf16=True)}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_nothing_but_rounding(log: Dataset, usual: tuple[Path, Result], tmp_path: Path, name: str) -> None:
    assert_close(train(CHANGES[name](config()), log.root, tmp_path), usual[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ROUNDED)
def test_lower_precision_stays_near(log: Dataset, usual: tuple[Path, Result], tmp_path: Path, name: str) -> None:
    found = train(config(compute=ROUNDED[name]), log.root, tmp_path)
    assert found["losses"] != usual[1]["losses"]
    assert_close(found, usual[1], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", ["attention", "target", "din", "state", "mean", "none"])
@pytest.mark.parametrize("mixture", ["none", "ple"])
def test_every_reader_of_the_history_runs_as_on_cpu(log: Dataset, tmp_path: Path, kind: str, mixture: str) -> None:
    model = config().model
    history = HistoryConfig(kind=kind, width=8, heads=2)  # type: ignore[arg-type]
    model = replace(model, history=history, mixture=replace(MixtureConfig(), kind=mixture, experts=3, hidden=(8,)))  # type: ignore[arg-type]
    run = config(model=model)
    assert_close(train(run, log.root, tmp_path / "gpu"), on_cpu(run, log.root, tmp_path / "cpu"))


@pytest.mark.parametrize("recipe", ["demo", "simulated"])
def test_recipes_train_and_score_as_on_cpu(log: Dataset, tmp_path: Path, recipe: str) -> None:
    run = replace(find(recipe)(), compute=FLOAT32, epochs=1, log_steps=1, days=config().days, recalibration_prior=None)
    # What is dropped is drawn on the device.
    run = replace(run, model=replace(run.model, embedding_dropout=0.0))
    assert_close(train(run, log.root, tmp_path / "gpu"), on_cpu(run, log.root, tmp_path / "cpu"), rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() != 1, reason="needs exactly one GPU")
def test_more_ranks_than_gpus_is_refused(log: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ConfigError, match="local rank 1 has no GPU"):
        train(config(), log.root, tmp_path)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("exchange", ["fp32", "bf16"])
def test_two_ranks_over_nccl_train_what_one_trains(
    log: Dataset, usual: tuple[Path, Result], tmp_path: Path, exchange: str
) -> None:
    run = config(sharding=ShardingConfig(exchange=exchange, tables={"item": ("row_wise",)}))  # type: ignore[arg-type]
    results = run_ranks(train, 2, run, log.root, tmp_path)
    tolerance = 1e-4 if exchange == "fp32" else 2e-2
    np.testing.assert_allclose(results[0]["losses"], usual[1]["losses"], rtol=tolerance)
    mine, theirs = predictions(results), predictions([usual[1]])
    np.testing.assert_allclose([mine[k] for k in theirs], [theirs[k] for k in theirs], atol=tolerance)
