"""The profile measures what it says, on one thread."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.serve.artifact import ArtifactInfo
from pipeline.serve.profile import profile


def test_every_shape_is_measured(artifact: Callable[[str, str], ArtifactInfo]) -> None:
    threads = torch.get_num_threads()
    found = profile(artifact("sr", "fp32"), requests=[1, 2], candidates=[3], repeats=3)
    assert torch.get_num_threads() == threads
    found = json.loads(json.dumps(found))
    shapes = [(s["requests"], s["candidates"], s["history"]) for s in found["shapes"]]
    assert shapes == [(1, 3, 0), (1, 3, 10), (2, 3, 0), (2, 3, 10)]
    for shape in found["shapes"]:
        assert shape["runs"] == 3
        assert 0 < shape["score_ms"]["p50"] <= shape["score_ms"]["p90"] <= shape["score_ms"]["p99"]
        rate = shape["candidates_per_second"] / (3 * shape["requests_per_second"])
        assert rate == pytest.approx(1.0)


def test_unusable_sizes(artifact: Callable[[str, str], ArtifactInfo]) -> None:
    with pytest.raises(ConfigError, match=r"candidates is \[0\]"):
        profile(artifact("sr", "fp32"), candidates=[0])
    with pytest.raises(ConfigError, match="repeats is 0"):
        profile(artifact("sr", "fp32"), repeats=0)
