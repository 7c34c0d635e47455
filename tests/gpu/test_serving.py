"""Artifacts of a model that a GPU trained score there what they score on CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.data.logs import Dataset
from pipeline.serve.example import made_up_requests
from pipeline.serve.export import export
from pipeline.serve.profile import profile
from pipeline.serve.scorer import Scorer
from pipeline.serve.tables import TableDtype
from tests.serve.conftest import CONFIG, train


@pytest.fixture(scope="module")
def checkpoint(log: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(CONFIG, log, tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("dtype", ["fp32", "int8", "int4"])
def test_an_artifact_scores_on_a_gpu_as_on_cpu(
    log: Dataset, checkpoint: Path, tmp_path: Path, dtype: TableDtype
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False  # as where nothing was trained before
    info = export(checkpoint, "sr", tmp_path / "artifact", dataset=log, dtype=dtype, max_requests=16)
    cpu, gpu = Scorer.open(info), Scorer.open(info, device=torch.device("cuda"))
    rows = made_up_requests(info.signature.schema, "sr", candidates=[3, 1, 9] * 10, history=[0, 5, 16] * 10)
    expected, found = cpu.score(rows), gpu.score(rows)
    assert found.column_names == expected.column_names
    for column in expected.column_names:
        mine, theirs = (np.concatenate(table[column].to_pylist()) for table in (found, expected))
        np.testing.assert_allclose(mine, theirs, atol=1e-5, err_msg=column)


def test_an_artifact_is_profiled_on_a_gpu(log: Dataset, checkpoint: Path, tmp_path: Path) -> None:
    info = export(checkpoint, "hf", tmp_path / "artifact", dataset=log, max_requests=16)
    found = profile(info, requests=(1, 4), candidates=(8,), repeats=5, device="cuda")
    assert found["device"] == torch.cuda.get_device_name()
    shapes = found["shapes"]
    assert isinstance(shapes, list)
    assert len(shapes) == 4
