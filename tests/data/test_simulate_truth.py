"""Truths beside the log: read back, joined, and bounded in memory."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pipeline.data.logs import Dataset
from pipeline.data.simulate import TASKS, SimulationConfig, simulate
from pipeline.data.simulate.oracle import figures
from pipeline.data.truth import has_truth, read_truth, with_truth
from pipeline.errors import DataError


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return simulate(tmp_path_factory.mktemp("truth") / "log", SimulationConfig.tiny())


def copy(log: Dataset, to: Path) -> Dataset:
    shutil.copytree(log.root, to / "log")
    return Dataset.open(to / "log")


def test_truths_have_the_rows_of_the_log(log: Dataset) -> None:
    for surface in log.schema.surfaces:
        table = read_truth(log, surface)
        partitions = log.partitions(surface)
        assert table.column_names == ["request_id", *TASKS]
        assert table.num_rows == sum(p.requests for p in partitions)
        assert len(table["click"].combine_chunks().flatten()) == sum(p.impressions for p in partitions)


def test_truths_of_some_days(log: Dataset) -> None:
    day = log.days[1]
    assert read_truth(log, "hf", (day,)).num_rows == log.partitions("hf", (day,))[0].requests
    with pytest.raises(DataError, match="unknown day"):
        read_truth(log, "hf", ("1999-01-01",))


def test_joined_on_the_candidate_in_the_order_of_the_table(log: Dataset) -> None:
    truths = read_truth(log, "rp").to_pylist()
    at = [(5, 1), (0, 0), (5, 0)]
    table = pl.DataFrame(
        {"surface": ["rp"] * 3, "request_id": [truths[r]["request_id"] for r, _ in at], "candidate": [c for _, c in at]}
    ).with_columns(pl.col("candidate").cast(pl.Int32), date=pl.lit(log.days[0]))
    joined = with_truth(table, log, TASKS)
    for task in TASKS:
        assert joined[f"truth_{task}"].to_list() == [truths[r][task][c] for r, c in at]
    stranger = table.with_columns(request_id=pl.lit(2**62))
    with pytest.raises(DataError, match="truths do not match the log's requests"):
        with_truth(stranger, log, TASKS)


def test_missing_truths_are_one_clear_error(log: Dataset, tmp_path: Path) -> None:
    assert has_truth(log)
    broken = copy(log, tmp_path)
    first = next(iter((broken.root / "truth" / "surface=hf").rglob("*.parquet")))
    first.unlink()
    with pytest.raises(DataError, match="a file of truths is missing"):
        read_truth(broken, "hf")
    shutil.rmtree(broken.root / "truth")
    assert not has_truth(broken)
    with pytest.raises(DataError, match="was not simulated"):
        read_truth(broken, "hf")


def test_figures_by_hand() -> None:
    f = figures(np.array([0.0, 1.0, 1.0, 0.0]), np.array([0.1, 0.8, 0.3, 0.3]))
    assert f.auc == pytest.approx((1 + 1 + 1 + 0.5) / 4)
    loss = -(np.log(0.9) + np.log(0.8) + np.log(0.3) + np.log(0.7)) / 4
    assert f.log_loss == pytest.approx(loss)
    assert f.ne == pytest.approx(loss / np.log(2))
    assert np.isnan(figures(np.ones(3), np.full(3, 0.5)).auc)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_log(tmp_path: Path) -> None:
    """Four times the users and requests in buckets of one size: the same peak, within a quarter."""
    script = (
        "import re, sys\n"
        "from pipeline.data.simulate import SimulationConfig, simulate\n"
        "n = int(sys.argv[2])\n"
        "simulate(sys.argv[1], SimulationConfig(requests=40_000 * n, users=4_000 * n, days=4, bucket_mb=16))\n"
        # Not ru_maxrss: it counts the parent's memory too, which the child had for a moment before exec.
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
    )
    peaks = []
    for n in (1, 4):
        command = [sys.executable, "-c", script, str(tmp_path / str(n)), str(n)]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    assert peaks[1] < 1.25 * peaks[0]
