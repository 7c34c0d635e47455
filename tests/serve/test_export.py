"""What an artifact holds, what it leaves away, and that it is not written where it disagrees with its trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch
from torch.export import ExportedProgram

from components.names import surface_of
from pipeline.config import ModelConfig
from pipeline.data.assemble import assemble_inputs
from pipeline.data.block import RequestBlock
from pipeline.data.logs import Dataset
from pipeline.errors import ArtifactError, ConfigError
from pipeline.serve import export as exporting
from pipeline.serve import parity
from pipeline.serve.artifact import ArtifactInfo
from pipeline.serve.example import made_up_requests
from pipeline.serve.export import example_tensors, export, serving_model, signature_of
from pipeline.serve.program import ServingModel, export_program, save_program
from pipeline.serve.rows import to_requests
from pipeline.serve.scorer import Scorer
from pipeline.serve.signature import Signature
from pipeline.serve.tables import is_table
from pipeline.serve.trained import TrainedModel
from pipeline.serve.vetting import vet_program
from pipeline.train import checkpoint as checkpoints
from pipeline.train.build import build_model
from pipeline.train.model_plan import model_plan
from tests.serve.conftest import CONFIG

Artifacts = Callable[[str, str], ArtifactInfo]


@pytest.fixture(scope="module")
def program(artifact: Artifacts) -> ExportedProgram:
    """The program of Related Pins with int8 tables, loaded once."""
    return torch.export.load(artifact("rp", "int8").path / "model.pt2")


def test_only_the_served_surface_is_in_the_program(artifact: Artifacts, program: ExportedProgram) -> None:
    names = set(program.state_dict)
    assert {surface_of(n) for n in names} - {None, "weight"} == {"rp"}
    for part in (
        "towers.trees.surface_rp",
        "mixture.gates.surface_rp",
        "calibration.maps.surface_rp",
        "late.surface_rp",
    ):
        assert any(part in n for n in names), part
    assert not program.constants, "a table or tower could hide among constants"
    traced = str(program.graph)
    assert "surface_rp" in traced
    assert not any(key in traced for key in ("surface_hf", "surface_sr", "query_term")), "of other surfaces"
    info = artifact("rp", "int8")
    pruning = info.read("metrics.json")["pruning"]
    assert "query_term" in pruning["dropped_tables"], "only Search has a query"
    # 8 values and a scale: 9 bytes a row, and not one row more than the tables that Related Pins reads and zeros.
    rows = 1 + sum(v.size for v in info.signature.schema.vocabularies)
    assert sum(v.numel() for n, v in program.state_dict.items() if is_table(n)) == 9 * rows
    dropped = pruning["dropped_parameters"]
    assert {surface_of(n) for n in dropped} == {"hf", "sr"}
    for what in ("dense_parameters", "parameters", "bytes"):
        assert pruning["artifact"][what] < pruning["unified"][what]
    # No row of Related Pins is computed by other surfaces' towers, in the trainer neither.
    assert 0 < pruning["artifact"]["flops"] <= pruning["unified"]["flops"]
    assert pruning["artifact"]["table_bytes_fp32"] == 32 * (rows - 1)


@pytest.mark.parametrize(("dtype", "largest"), [("int8", 0.02), ("int4", 0.1)])
def test_rounded_tables_are_near_and_reported(artifact: Artifacts, log: Dataset, dtype: str, largest: float) -> None:
    info = artifact("rp", dtype)
    found = info.read("parity.json")
    assert found["rows"]["kind"] == "held out"
    assert found["rows"]["days"] == [log.days[-1]]
    for task in CONFIG.tasks:
        values = found["tasks"][task]
        assert 0 < values["largest_difference"] <= largest
        assert abs(values["auc_trainer"] - values["auc_artifact"]) < 0.02
    assert info.read("metrics.json")["tasks"]["click"]["values"]["auc"] == found["tasks"]["click"]["auc_artifact"]


def test_fp32_is_the_trainer(artifact: Artifacts) -> None:
    for values in artifact("sr", "fp32").read("parity.json")["tasks"].values():
        assert values["largest_difference"] <= 1e-6
    assert artifact("sr", "fp32").signature.dtype == "fp32"


def test_disagreement_fails_and_leaves_nothing(
    artifact: Artifacts,
    program: ExportedProgram,
    checkpoint: Path,
    log: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The program of another training, as it were: one bias of the calibration is off."""
    bias = program.state_dict["body.calibration.maps.surface_rp.bias"].detach()
    bias += torch.tensor([0.0, 0.5])
    monkeypatch.setattr(exporting, "export_program", lambda model, example: program)
    with pytest.raises(ArtifactError, match=r"(?s)int8 artifact disagrees.*save: largest_difference") as raised:
        export(checkpoint, "rp", tmp_path / "out", dataset=log)
    bias -= torch.tensor([0.0, 0.5])
    assert "click" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("off", [np.nan, 0.05, -0.05])
def test_bounds(off: float) -> None:
    trainer = np.full((10, 1), 0.5)
    parity.check(parity.compare(("click",), trainer, trainer), "fp32")
    with pytest.raises(ArtifactError, match="click: largest_difference"):
        parity.check(parity.compare(("click",), trainer, trainer + off), "int8")


def test_drift_of_rare_outcomes() -> None:
    trainer = np.full((10, 1), 0.001)
    with pytest.raises(ArtifactError, match=r"click: mean_drift is 0\.5"):
        parity.check(parity.compare(("click",), trainer, trainer * 1.5), "int8")


def test_unusable_requests(checkpoint: Path, log: Dataset, artifact: Artifacts, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown surface 'hff'; did you mean 'hf'"):
        export(checkpoint, "hff", tmp_path / "out")
    with pytest.raises(ConfigError, match="max_requests is 0"):
        export(checkpoint, "hf", tmp_path / "out", max_requests=0)
    with pytest.raises(ArtifactError, match="already exists"):
        export(checkpoint, "hf", artifact("sr", "fp32").path)
    other = replace(log, description=replace(log.description, schema=replace(log.schema, label_delay_ms=1)))
    with pytest.raises(ArtifactError, match="has another schema"):
        export(checkpoint, "hf", tmp_path / "out", dataset=other)
    assert list(tmp_path.iterdir()) == []


def test_key_maps_travel_with_the_artifact(checkpoint: Path, log: Dataset, tmp_path: Path) -> None:
    source, folder = tmp_path / "log", tmp_path / "artifact"
    (source / "vocabularies").mkdir(parents=True)
    folder.mkdir()
    for name in ("item", "query_term"):
        pl.DataFrame({"key": ["a"], "id": [1]}).write_parquet(source / "vocabularies" / f"{name}.parquet")
    state = checkpoints.read_state(checkpoint)
    copied = exporting._copy_vocabularies(state, "hf", replace(log, root=source), folder)
    assert copied == ("item",), "Home Feed has no query"
    assert pl.read_parquet(folder / "vocabularies" / "item.parquet")["id"].to_list() == [1]


def variants() -> dict[str, ModelConfig]:
    """Models with other blocks than the tiny one's."""
    base = CONFIG.model
    return {
        "target attention, monotone calibration": replace(
            base, history=replace(base.history, kind="target"), calibration="monotone"
        ),
        "mean history, no mixture, no crossing": replace(
            base,
            history=replace(base.history, kind="mean"),
            projection=replace(base.projection, kind="linear"),
            mixture=replace(base.mixture, kind="none"),
            cross_layers=0,
        ),
        "no history, shared towers, global calibration": replace(
            base,
            history=replace(base.history, kind="none"),
            mixture=replace(base.mixture, kind="shared_bottom"),
            towers="shared",
            late_fusion=False,
            calibration="global",
        ),
        "causal, gated": replace(
            base,
            history=replace(base.history, causal=True),
            projection=replace(base.projection, kind="none"),
            surface_gate=True,
            calibration="none",
        ),
        "user state, PLE, residual towers": replace(
            base,
            history=replace(base.history, kind="state"),
            mixture=replace(base.mixture, kind="ple"),
            towers="residual",
        ),
        "attention that projects queries": replace(
            base, history=replace(base.history, kind="attention", few_candidates=True)
        ),
        "DIN, STAR": replace(
            base,
            history=replace(base.history, kind="din"),
            mixture=replace(base.mixture, kind="shared_bottom"),
            towers="star",
        ),
    }


def built(log: Dataset, model: ModelConfig, surface: str) -> tuple[ServingModel, Signature, Callable]:
    """An untrained serving model, its signature, and the scores of the plain model."""
    config = replace(CONFIG, model=model)
    moments = {f.name: (0.0, 1.0) for f in log.schema.features}
    plan = replace(model_plan(config, log.schema, moments), keep=(surface,))
    torch.manual_seed(0)
    plain = build_model(plan, table_device=torch.device("cpu")).eval()
    served = serving_model(plan, plain, "fp32")
    signature = signature_of(plan, served, surface, 10)

    def score(block: RequestBlock) -> torch.Tensor:
        return torch.sigmoid(plain(assemble_inputs({surface: block}, plan.layout)).calibrated)

    return served, signature, score


def example_of(signature: Signature, candidates: list[int], history: list[int]) -> RequestBlock:
    table = made_up_requests(signature.schema, signature.surface, candidates=candidates, history=history)
    return to_requests(table, signature, "rows").block


@pytest.mark.parametrize("name", list(variants()))
@pytest.mark.parametrize("surface", ["hf", "sr", "rp"])
def test_packed_is_plain_for_other_models(log: Dataset, name: str, surface: str) -> None:
    served, signature, plain = built(log, variants()[name], surface)
    block = example_of(signature, [3, 1, 4], [2, 0, 7])
    with torch.no_grad():
        torch.testing.assert_close(served(signature.tensors.tensors(block)), plain(block), atol=1e-6, rtol=0)


# What a shipped recipe reads its history with is tried every time, the others in the slow run.
SHIPPED = "attention that projects queries"


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n != SHIPPED)) for n in variants()])
def test_other_models_export(log: Dataset, name: str, tmp_path: Path) -> None:
    """Their programs too are nothing but what vetting lets through, and score any shape of rows as they do."""
    served, signature, plain = built(log, variants()[name], "sr")
    save_program(export_program(served, example_tensors(signature)), tmp_path / "model.pt2")
    vet_program(tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module(check_guards=False)
    with torch.no_grad():
        for candidates, history in (([1], [0]), ([1], [3]), ([200], [10]), ([3] * 16, [10] * 16)):
            block = example_of(signature, candidates, history)
            got = program(signature.tensors.tensors(block))
            torch.testing.assert_close(got, plain(block), atol=1e-6, rtol=0)


@pytest.mark.slow
def test_compiled_scores_as_the_trainer(checkpoint: Path, log: Dataset, tmp_path: Path) -> None:
    """The parity gate runs on the compiled program; shapes that held-out rows lack must do too."""
    info = export(checkpoint, "rp", tmp_path / "out", dataset=log, dtype="fp32", compile=True)
    scorer, state = Scorer.open(info), checkpoints.read_state(checkpoint)
    for candidates, history in (([1], [0]), ([1], [1]), ([200], [10]), ([3] * 16, [0] * 16)):
        table = made_up_requests(info.signature.schema, "rp", candidates=candidates, history=history)
        nothing = pa.nulls(len(candidates), pa.int64())
        for rows in (table, table.set_column(table.column_names.index("related_item"), "related_item", nothing)):
            block = to_requests(rows, info.signature, "rows").block
            trainer = TrainedModel(checkpoint, state).scores("rp", block)
            np.testing.assert_allclose(scorer.score_block(block), trainer, atol=1e-6)
