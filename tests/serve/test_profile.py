"""The profile measures what it says, on one thread."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.cli import main
from pipeline.errors import ConfigError
from pipeline.serve.artifact import ArtifactInfo
from pipeline.serve.profile import _summary, by_candidates, profile


def test_every_shape_is_measured(artifact: Callable[[str, str], ArtifactInfo]) -> None:
    threads = torch.get_num_threads()
    found = profile(artifact("sr", "fp32"), requests=[1, 2], candidates=[3], repeats=3)
    assert torch.get_num_threads() == threads
    found = json.loads(json.dumps(found))
    shapes = [(s["requests"], s["candidates"], s["history"]) for s in found["shapes"]]
    assert shapes == [(1, 3, 0), (1, 3, 10), (2, 3, 0), (2, 3, 10)]
    for shape in found["shapes"]:
        assert (shape["runs"], shape["turns"]) == (3, 3)
        assert 0 < shape["score_ms"]["p50"] <= shape["score_ms"]["p90"] <= shape["score_ms"]["p99"]
        low, high = shape["score_ms"]["intervals"]["p50"]
        assert low <= shape["score_ms"]["p50"] <= high
        assert shape["seconds_per_thousand_candidates"] == pytest.approx(1000 / shape["candidates_per_second"])
        rate = shape["candidates_per_second"] / (3 * shape["requests_per_second"])
        assert rate == pytest.approx(1.0)


def test_an_interval_goes_from_the_least_to_the_largest_turn() -> None:
    found = _summary([np.array([1.0, 2.0, 3.0]), np.array([5.0, 5.0, 8.0])])
    assert found["p50"] == 4.0
    assert found["intervals"]["p50"] == [2.0, 5.0]  # type: ignore[index]
    assert found["mean"] == 4.0
    assert found["intervals"]["mean"] == [2.0, 6.0]  # type: ignore[index]
    assert found["intervals"]["p99"] == [pytest.approx(2.98), pytest.approx(7.94)]  # type: ignore[index]


def test_a_line_over_candidates() -> None:
    def shape(candidates: int, history: int, ms: float) -> dict:
        times = {"p50": ms, "mean": ms, "intervals": {"p50": [ms - 1, ms + 2], "mean": [ms, ms + 1]}}
        return {"requests": 1, "candidates": candidates, "history": history, "score_ms": times}

    found = {"shapes": [shape(1, 0, 3.0), shape(1, 10, 4.0), shape(8, 0, 5.0), shape(8, 10, 6.0)]}
    line = by_candidates(found, requests=1, history=64)
    assert (line.x, line.y, line.low, line.high) == ([1, 8], [4.0, 6.0], [3.0, 5.0], [6.0, 8.0])
    line = by_candidates(found, requests=1, history=0, percentile="mean")
    assert (line.y, line.low, line.high) == ([3.0, 5.0], [3.0, 5.0], [4.0, 6.0])
    with pytest.raises(ConfigError, match="no shape of 16 requests with 0 events was measured"):
        by_candidates(found, requests=16, history=0)


def test_operations_bytes_and_memory_do_not_depend_on_the_machine(
    artifact: Callable[[str, str], ArtifactInfo],
) -> None:
    def shapes(**sizes: list[int]) -> dict[int, dict]:
        found = profile(artifact("sr", "fp32"), requests=[1], history=[10], repeats=1, seconds=0.01, **sizes)
        return {s["candidates"]: s for s in found["shapes"]}

    first, again = shapes(candidates=[2, 4, 8]), shapes(candidates=[2, 4, 8])
    for name in ("flops", "bytes_read", "peak_mb"):
        assert [s[name] for s in first.values()] == [s[name] for s in again.values()]
        # What belongs to the request is paid once, so cost is linear in candidates and not proportional to them.
        two, four, eight = (first[n][name] for n in (2, 4, 8))
        assert 0 < two < four < eight < 4 * two
    assert first[8]["flops"] - first[4]["flops"] == 2 * (first[4]["flops"] - first[2]["flops"])


def test_the_verb_writes_a_profile_for_each_artifact(
    artifact: Callable[[str, str], ArtifactInfo], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = str(artifact("sr", "fp32").path), tmp_path / "cost.json"
    sizes = ["--requests", "1", "--candidates", "2", "--history", "3", "--seconds", "0.05"]
    assert main(["profile", "--artifact", folder, "--out", str(out), *sizes]) == 0
    (found,) = json.loads(out.read_text())["profiles"]
    assert found["surface"] == "sr"
    assert "candidates/s" in capsys.readouterr().out


def test_unusable_sizes(artifact: Callable[[str, str], ArtifactInfo]) -> None:
    with pytest.raises(ConfigError, match=r"candidates is \[0\]"):
        profile(artifact("sr", "fp32"), candidates=[0])
    with pytest.raises(ConfigError, match="device is 'tpu'; this machine can measure on cpu"):
        profile(artifact("sr", "fp32"), device="tpu")
    with pytest.raises(ConfigError, match="repeats is 0"):
        profile(artifact("sr", "fp32"), repeats=0)
