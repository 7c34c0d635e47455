"""Fresh weights reach a running scorer whole, and only where they belong."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.data.logs import Dataset
from pipeline.errors import ArtifactError
from pipeline.serve import delta as deltas
from pipeline.serve.artifact import ArtifactInfo, write_manifest
from pipeline.serve.delta import Delta, weights_digest
from pipeline.serve.example import made_up_requests
from pipeline.serve.export import export, export_delta
from pipeline.serve.rows import to_requests
from pipeline.serve.scorer import Scorer
from pipeline.serve.trained import TrainedModel
from pipeline.train import checkpoint as checkpoints
from pipeline.train.model_plan import ModelPlan
from pipeline.train.task import TrainTask

Artifacts = Callable[[str, str], ArtifactInfo]


@dataclass(frozen=True)
class Newer:
    """A delta to an artifact of Search, and the scores that the newer weights give."""

    base: ArtifactInfo
    path: Path
    delta: Delta
    rows: pa.Table
    scores: np.ndarray


def matrix(scores: pa.Table) -> np.ndarray:
    return np.stack([c.combine_chunks().flatten().to_numpy() for c in scores.columns], axis=1)


@pytest.fixture(scope="module")
def later() -> Iterator[None]:
    """The checkpoint as if it had been trained on: two items and one layer have moved."""
    load = checkpoints.load_task

    def changed(checkpoint: Path, plan: ModelPlan | None = None) -> TrainTask:
        task = load(checkpoint, plan)
        with torch.no_grad():
            for name, parameter in task.named_parameters():
                if name.endswith("embeddings.item.weight"):
                    parameter[3] += 0.5
                    parameter[7] -= 0.5
                elif "calibration" in name and name.endswith("bias"):
                    parameter += 0.25
        return task

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "load_task", changed)
        yield


@pytest.fixture(scope="module")
def newer(
    artifact: Artifacts, checkpoint: Path, log: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], Newer]:
    base = artifact("sr", "int8")
    out = tmp_path_factory.mktemp("delta") / "delta"

    def make() -> Newer:
        if not out.exists():
            export_delta(checkpoint, base.path, out, dataset=log)
        rows = made_up_requests(base.signature.schema, "sr", candidates=[9] * 12, history=[10] * 12)
        block = to_requests(rows, base.signature, "rows").block
        trained = TrainedModel(checkpoint, checkpoints.read_state(checkpoint))
        return Newer(base, out, deltas.read_delta(out), rows, trained.scores("sr", block))

    return make


def test_a_delta_holds_what_changed_and_gives_what_a_whole_export_gives(
    newer: Callable[[], Newer], later: None, checkpoint: Path, log: Dataset, tmp_path: Path
) -> None:
    made = newer()
    assert made.delta.changed_rows == {
        "tables.rows_8": (2, 1 + sum(v.size for v in made.base.signature.schema.vocabularies))
    }
    assert made.delta.bytes < made.delta.full_bytes
    scorer = Scorer.open(made.base)
    assert scorer.weights == made.delta.base == made.base.signature.weights
    before = matrix(scorer.score(made.rows))
    scorer.apply(made.path)
    after = matrix(scorer.score(made.rows))
    assert np.abs(after - before).max() > 0.01
    np.testing.assert_allclose(after, made.scores, atol=0.01)
    whole = Scorer.open(export(checkpoint, "sr", tmp_path / "whole", dataset=log, dtype="int8", max_requests=16))
    assert scorer.weights == whole.weights == made.delta.result
    np.testing.assert_array_equal(after, matrix(whole.score(made.rows)))
    np.testing.assert_array_equal(before, matrix(Scorer.open(made.base).score(made.rows)))


def test_no_call_mixes_versions(newer: Callable[[], Newer], later: None) -> None:
    """Each call is split into many parts; all of them are of one version, while weights change in another thread."""
    made = newer()
    info = replace(made.base, signature=replace(made.base.signature, max_requests=1))
    old = matrix(Scorer.open(info).score(made.rows))
    scorer = Scorer.open(info)
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(scorer.score, made.rows) for _ in range(10)]
        scorer.apply(made.path)
        calls += [pool.submit(scorer.score, made.rows) for _ in range(10)]
        found = [matrix(c.result()) for c in calls]
    new = matrix(scorer.score(made.rows))
    assert not np.array_equal(old, new)
    for scores in found:
        assert np.array_equal(scores, old) or np.array_equal(scores, new)
    np.testing.assert_array_equal(found[-1], new)


def test_a_delta_of_other_weights_is_refused(newer: Callable[[], Newer], later: None) -> None:
    made = newer()
    scorer = Scorer.open(made.base)
    scorer.apply(made.path)
    state, scores = scorer.weights, matrix(scorer.score(made.rows))
    with pytest.raises(ArtifactError, match=f"starts from weights {made.delta.base[:12]}, these are {state[:12]}"):
        scorer.apply(made.path)
    assert scorer.weights == state
    np.testing.assert_array_equal(matrix(scorer.score(made.rows)), scores)


def test_a_damaged_delta_is_refused(newer: Callable[[], Newer], later: None, tmp_path: Path) -> None:
    made = newer()
    scorer = Scorer.open(made.base)
    with pytest.raises(ArtifactError, match="there is no delta folder"):
        scorer.apply(tmp_path / "none")
    copy = tmp_path / "copy"
    shutil.copytree(made.path, copy)
    content = bytearray((copy / "delta.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "delta.safetensors").write_bytes(content)
    with pytest.raises(ArtifactError, match="is not what was exported: its checksum differs"):
        scorer.apply(copy)
    write_manifest(copy, {})
    with pytest.raises(ArtifactError, match=f"promises weights {made.delta.result[:12]} and gives"):
        scorer.apply(copy)
    assert scorer.weights == made.delta.base
    (copy / "delta.safetensors").write_bytes(content[:-8])
    with pytest.raises(ArtifactError, match="is not what was exported"):
        scorer.apply(copy)


def test_a_delta_cannot_change_shapes(tmp_path: Path) -> None:
    base = {"tables.rows_8": torch.zeros(5, 9, dtype=torch.uint8)}
    with pytest.raises(
        ArtifactError, match=r"tables.rows_8 was uint8 \[5, 9\] and is uint8 \[6, 9\]: tables or layers"
    ):
        deltas.write_delta(
            tmp_path, surface="hf", dtype="int8", base=base, new={"tables.rows_8": torch.zeros(6, 9, dtype=torch.uint8)}
        )


def test_the_digest_is_of_names_types_shapes_and_values() -> None:
    base = {"a": torch.zeros(2, 3), "b": torch.ones(2)}
    assert weights_digest(base) == weights_digest(dict(reversed(base.items())))
    others = [
        {"a": torch.zeros(3, 2), "b": torch.ones(2)},
        {"a": torch.zeros(2, 3, dtype=torch.int32), "b": torch.ones(2)},
        {"a": torch.zeros(2, 3), "c": torch.ones(2)},
        {"a": torch.zeros(2, 3), "b": torch.tensor([1.0, 1.0000001])},
    ]
    assert len({weights_digest(t) for t in [base, *others]}) == 5


def test_the_artifact_must_be_of_the_same_model(
    artifact: Artifacts, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, base = checkpoints.read_state(checkpoint), artifact("sr", "int8").path
    other = replace(state, schema=replace(state.schema, label_delay_ms=1))
    monkeypatch.setattr(checkpoints, "read_state", lambda _: other)
    with pytest.raises(ArtifactError, match="has other features or vocabularies"):
        export_delta(checkpoint, base, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
