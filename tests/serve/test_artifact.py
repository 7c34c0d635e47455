"""Damage to an artifact is found before anything in it is used."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.errors import ArtifactError
from pipeline.serve.artifact import ArtifactInfo, open_artifact, write_manifest
from pipeline.serve.scorer import Scorer
from pipeline.serve.vetting import vet_program


@pytest.fixture
def copy(artifact: Callable[[str, str], ArtifactInfo], tmp_path: Path) -> Path:
    shutil.copytree(artifact("sr", "fp32").path, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_copy_is_the_same_artifact(artifact: Callable[[str, str], ArtifactInfo], copy: Path) -> None:
    info = open_artifact(copy)
    assert info.digest == artifact("sr", "fp32").digest
    assert info.surface == "sr"
    assert set(info.manifest.files) == {"model.pt2", "signature.json", "metrics.json", "parity.json", "config.json"}
    assert info.read("config.json")["run"]["name"] == "tiny"
    assert {i.name: i.shape for i in info.signature.inputs}["candidate_rows_8"][0] == "C"


@pytest.mark.parametrize("name", ["model.pt2", "signature.json", "parity.json", "config.json", "metrics.json"])
@pytest.mark.parametrize("damage", ["flipped", "truncated"])
def test_one_changed_or_missing_byte(copy: Path, name: str, damage: str) -> None:
    content = bytearray((copy / name).read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    else:
        del content[-1]
    (copy / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=f"{name} is not what was exported: its checksum differs"):
        Scorer.open(copy)


def test_missing_parts(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="there is no artifact folder"):
        open_artifact(tmp_path / "none")
    (copy / "model.pt2").rename(copy / "model.away")
    with pytest.raises(ArtifactError, match=r"lacks its file model\.pt2"):
        open_artifact(copy)
    write_manifest(copy, {})
    with pytest.raises(ArtifactError, match=r"its manifest does not name model\.pt2"):
        open_artifact(copy)
    (copy / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=r"holds no manifest\.json"):
        open_artifact(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m | {"format_version": 7}, "has format version 7, this version of Trefoil reads 2"),
        (lambda m: m | {"files": 3}, "is damaged: files"),
        (lambda m: m | {"files": m["files"] | {"../x": m["files"]["model.pt2"]}}, r"outside its folder: \.\./x"),
        (lambda m: [m], "is damaged"),
    ],
)
def test_a_manifest_that_cannot_be_true(copy: Path, change: Callable[[dict], object], message: str) -> None:
    path = copy / "manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ArtifactError, match=message):
        open_artifact(copy)


def test_a_signature_of_another_version(copy: Path) -> None:
    path = copy / "signature.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 7}))
    write_manifest(copy, {})
    with pytest.raises(ArtifactError, match="not a signature of this version: format_version"):
        open_artifact(copy)


def test_nothing_is_pickled(copy: Path, tmp_path: Path) -> None:
    """The program holds no pickle, and one that does is refused though its checksum fits."""
    vet_program(copy / "model.pt2")
    example = (torch.ones(2),)
    torch.export.save(torch.export.export(torch.nn.ReLU(), example), tmp_path / "pickled.pt2")
    (tmp_path / "pickled.pt2").replace(copy / "model.pt2")
    write_manifest(copy, {})
    with pytest.raises(ArtifactError, match=r"holds a pickle .*sample_inputs"):
        open_artifact(copy)


def test_a_program_that_is_none(copy: Path) -> None:
    (copy / "model.pt2").write_bytes(b"not a zip")
    write_manifest(copy, {})
    with pytest.raises(ArtifactError, match=r"model\.pt2 is damaged"):
        open_artifact(copy)
    with zipfile.ZipFile(copy / "model.pt2", "w") as archive:
        archive.writestr("x/y", "z")
    write_manifest(copy, {})
    with pytest.raises(ArtifactError, match="cannot be loaded by torch"):
        Scorer.open(copy)


def test_a_program_of_other_inputs(copy: Path) -> None:
    path = copy / "signature.json"
    signature = json.loads(path.read_text())
    signature["inputs"] = signature["inputs"][1:]
    path.write_text(json.dumps(signature))
    write_manifest(copy, {})
    with pytest.raises(ArtifactError, match="the signature names"):
        Scorer.open(copy)
