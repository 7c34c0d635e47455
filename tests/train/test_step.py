"""Precision and micro-batches change rounding alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import ComputeConfig, ShardingConfig
from pipeline.errors import ConfigError
from pipeline.job import precision
from tests.train.runs import parameters, predictions, tiny_config, train


@pytest.fixture(scope="module")
def usual(log: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train(tiny_config(), log, tmp_path_factory.mktemp("usual"))


def test_micro_batches_train_as_the_whole_batch_does(log: Path, usual: dict[str, Any], tmp_path: Path) -> None:
    found = train(tiny_config(compute=ComputeConfig(micro_batches=3)), log, tmp_path)
    np.testing.assert_allclose(found["losses"], usual["losses"], rtol=1e-4)
    want = parameters(usual["checkpoint"])
    for name, value in parameters(found["checkpoint"]).items():
        np.testing.assert_allclose(value, want[name], rtol=2e-3, atol=2e-5, err_msg=name)


def test_without_overlap_every_epoch_is_trained_and_every_day_scored(log: Path, tmp_path: Path) -> None:
    run = tiny_config(epochs=2)
    usual = train(run, log, tmp_path / "usual")
    found = train(replace(run, sharding=ShardingConfig(pipeline=False)), log, tmp_path / "found")
    assert found["losses"] == usual["losses"]
    assert found["predictions"] == usual["predictions"]


def test_bf16_trains_near_float32_and_scores_in_float32(log: Path, usual: dict[str, Any], tmp_path: Path) -> None:
    found = train(tiny_config(compute=ComputeConfig(bf16=True)), log, tmp_path)
    assert found["losses"] != usual["losses"]
    np.testing.assert_allclose(found["losses"], usual["losses"], rtol=2e-2)
    mine, theirs = predictions([found]), predictions([usual])
    np.testing.assert_allclose([mine[k] for k in theirs], [theirs[k] for k in theirs], atol=2e-2)
    assert all(v.dtype == np.float32 for v in parameters(found["checkpoint"]).values() if v.dtype.kind == "f")


def test_tf32_changes_nothing_on_cpu_and_says_so(log: Path, usual: dict[str, Any], tmp_path: Path) -> None:
    off = tiny_config(compute=ComputeConfig(tf32=False))
    assert train(off, log, tmp_path)["losses"] == usual["losses"]
    assert precision(tiny_config(), "cpu") == "dense part: float32 (compute.tf32 has no effect on cpu)"
    assert precision(tiny_config(), "cuda") == "dense part: float32, TF32 products, deterministic"
    assert precision(off, "cuda") == "dense part: float32, deterministic"


@pytest.mark.slow
@pytest.mark.timeout(600)  # translating takes half a minute, or several where others compute
def test_a_compiled_dense_part_trains_like_an_eager_one(log: Path, usual: dict[str, Any], tmp_path: Path) -> None:
    found = train(tiny_config(compute=ComputeConfig(compile=True)), log, tmp_path)
    np.testing.assert_allclose(found["losses"], usual["losses"], rtol=1e-3)


def test_no_micro_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"compute\.micro_batches is 0; it must be at least 1"):
        tiny_config(compute=ComputeConfig(micro_batches=0))
