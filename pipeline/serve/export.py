"""From a checkpoint of the unified model to the artifact of one surface."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from pipeline.config import config_to_json
from pipeline.data.assemble import assemble_inputs
from pipeline.data.block import RequestBlock, block_from_arrow, columns_of
from pipeline.data.logs import Dataset, arrow_schema
from pipeline.errors import ArtifactError, ConfigError, unknown
from pipeline.evaluate.metrics import TaskMetrics
from pipeline.serve import parity
from pipeline.serve.artifact import (
    COMPILED,
    CONFIG,
    METRICS,
    MODEL,
    PARITY,
    SIGNATURE,
    VOCABULARIES,
    ArtifactInfo,
    open_artifact,
    write_manifest,
)
from pipeline.serve.example import made_up_requests
from pipeline.serve.program import (
    ServingModel,
    compile_program,
    export_program,
    input_specs,
    save_program,
    serving_tensors,
)
from pipeline.serve.rows import to_requests
from pipeline.serve.scorer import Scorer, load_program
from pipeline.serve.signature import Signature, served_schema, signature_to_json
from pipeline.serve.tables import TableDtype
from pipeline.train import checkpoint as checkpoints
from pipeline.train.build import ModelPlan
from pipeline.train.checkpoint import CheckpointState
from pipeline.train.tables import table_of

# Most requests in one run of the program.
MAX_REQUESTS = 256
# Sizes of the example that is traced; any but 0 and 1 and each other serve.
_EXAMPLE_CANDIDATES, _EXAMPLE_HISTORY = (5, 3, 7), (4, 9, 6)
_MADE_UP_REQUESTS = 64
_LIBRARIES = ("trefoil", "torch", "torchrec")


def export(
    checkpoint: Path,
    surface: str,
    out: Path,
    *,
    dataset: Dataset | None = None,
    days: tuple[str, ...] | None = None,
    dtype: TableDtype = "int8",
    parity_rows: int = 20_000,
    max_requests: int = MAX_REQUESTS,
    compile: bool = False,
) -> ArtifactInfo:
    """Prune a trained model to one surface, quantise its tables, export it, compare it with the trainer, write it.

    Args:
        checkpoint: folder of a checkpoint.
        surface: the surface to serve.
        out: folder to write; must not yet exist, or be empty.
        dataset: log with held-out rows for parity and metrics, and with the maps of raw keys to ids; without it
            parity is checked on made-up rows and there are no metrics.
        days: its held-out days; None takes its last.
        dtype: how table values are stored.
        parity_rows: about how many held-out candidates to compare.
        max_requests: most requests in one run of the program; the scorer splits beyond it.
        compile: also compile with AOTInductor, which needs a C++ compiler and makes scoring faster.

    Raises:
        ConfigError: the model does not serve the surface.
        CheckpointError: the checkpoint is no whole one.
        DataError: the log has no rows for parity, or of another schema.
        ArtifactError: `out` is taken, or the artifact's scores are not the trainer's; nothing is left behind.
    """
    state = checkpoints.read_state(checkpoint)
    if surface not in state.config.surfaces:
        raise ConfigError(unknown("surface", surface, state.config.surfaces))
    if max_requests < 1:
        raise ConfigError(f"max_requests is {max_requests}; it must be at least 1")
    if (out.is_dir() and any(out.iterdir())) or out.is_file():
        raise ArtifactError(f"{out} already exists; choose another folder for the artifact, or remove it first")
    if dataset is not None and dataset.schema != state.schema:
        raise ArtifactError(f"{dataset.root} has another schema than the log of {checkpoint}; give the log of the run")
    beside = out.parent / f".{out.name}.writing"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        job = _Job(checkpoint, state, surface, beside, dtype, max_requests)
        job.write_program(compile=compile, key_maps=_copy_vocabularies(state, surface, dataset, beside))
        job.write_reports(_rows(job.signature, dataset, days, parity_rows))
        write_manifest(beside, _versions())
        os.replace(beside, out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return open_artifact(out)


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Rows for parity, and where they are from."""

    table: pa.Table
    source: dict[str, object]
    labelled: bool


def _rows(signature: Signature, dataset: Dataset | None, days: tuple[str, ...] | None, count: int) -> _Rows:
    if dataset is None:
        sizes = np.random.default_rng(0).integers(1, 20, _MADE_UP_REQUESTS).tolist()
        events = (np.arange(_MADE_UP_REQUESTS) % (signature.history_length + 1)).tolist()
        table = made_up_requests(signature.schema, signature.surface, candidates=sizes, history=events)
        return _Rows(table=table, source={"kind": "made up", "candidates": sum(sizes)}, labelled=False)
    days = days or dataset.days[-1:]
    table = parity.held_out(dataset, signature.surface, days, count)
    source = {"kind": "held out", "dataset": dataset.fingerprint, "days": list(days), "requests": table.num_rows}
    return _Rows(table=table, source=source, labelled=True)


class _Job:
    """One export under way, in its temporary folder."""

    def __init__(
        self,
        checkpoint: Path,
        state: CheckpointState,
        surface: str,
        folder: Path,
        dtype: TableDtype,
        max_requests: int,
    ) -> None:
        self.checkpoint, self.state, self.folder = checkpoint, state, folder
        self.plan: ModelPlan = replace(state.plan, keep=(surface,))
        self.signature = Signature(
            format_version=1,
            surface=surface,
            tasks=state.config.tasks,
            dtype=dtype,
            history_length=_history_length(state, self.plan),
            max_requests=max_requests,
            schema=served_schema(state.schema, self.plan.layout, surface),
            layout=self.plan.layout,
            inputs=(),
            key_maps=(),
        )
        self.served: dict[str, object] = {}

    def write_program(self, *, compile: bool, key_maps: tuple[str, ...]) -> None:
        """Write the program, compiled too if asked, the signature and the run's configuration."""
        task = checkpoints.load_task(self.checkpoint, self.plan)
        layout, surface = self.signature.layout, self.signature.surface
        served = ServingModel(model=task.model, layout=layout, dtype=self.signature.dtype)
        rows = made_up_requests(
            self.signature.schema, surface, candidates=_EXAMPLE_CANDIDATES, history=_EXAMPLE_HISTORY
        )
        block = to_requests(rows, replace(self.signature, history_length=max(_EXAMPLE_HISTORY)), "the example").block
        example = serving_tensors(assemble_inputs({surface: block}, layout), layout)
        program = export_program(served, example)
        if compile:
            compile_program(program, self.folder / COMPILED)
        save_program(program, self.folder / MODEL)
        self.served = {
            "tables": _table_sizes(task),
            "dense_parameters": sum(p.numel() for p in served.body.parameters()),
            "table_bytes": sum(b.numel() for n, b in served.named_buffers() if n.endswith("tables.weights")),
            "program_bytes": (self.folder / MODEL).stat().st_size,
            "names": sorted(n for n, _ in served.body.named_parameters()),
        }
        self.signature = replace(self.signature, inputs=input_specs(example), key_maps=key_maps)
        (self.folder / SIGNATURE).write_bytes(signature_to_json(self.signature))
        (self.folder / CONFIG).write_bytes(_run_json(self.state))

    def write_reports(self, rows: _Rows) -> None:
        """Score the rows with trainer and artifact, write what came out, or raise."""
        signature = self.signature
        scorer = Scorer(signature, load_program(self.folder, signature))
        block = to_requests(rows.table, signature, "the parity rows").block
        artifact = scorer.score_block(block)
        trainer, unified = trainer_scores(self.checkpoint, self.state, signature.surface, block)
        differences = parity.compare(signature.tasks, trainer, artifact)
        parity.check(differences, signature.dtype)
        judged: list[dict[str, TaskMetrics] | None] = [
            parity.judge(rows.table, signature.surface, signature.tasks, p) if rows.labelled else None
            for p in (trainer, artifact)
        ]
        source = rows.source | {"candidates": len(artifact)}
        found = parity.report(
            dtype=signature.dtype, source=source, differences=differences, trainer=judged[0], artifact=judged[1]
        )
        _write_json(self.folder / PARITY, found)
        metrics: dict[str, object] = {"rows": source, "pruning": self._pruning(unified)}
        if judged[1] is not None:
            metrics["tasks"] = {task: asdict(values) for task, values in judged[1].items()}
        _write_json(self.folder / METRICS, metrics)

    def _pruning(self, unified: nn.Module) -> dict[str, object]:
        """What the unified model has and the artifact left away."""
        tables = _table_sizes(unified)
        dense = {n.removeprefix("model.body."): p for n, p in unified.named_parameters() if table_of(n) is None}
        kept = self.served.pop("names")
        assert isinstance(kept, list), "names of parameters"
        served_tables = self.served["tables"]
        assert isinstance(served_tables, dict), "rows by dimension of each table"
        values = sum(p.numel() for p in unified.parameters())
        return {
            "unified": {
                "tables": tables,
                "dense_parameters": sum(p.numel() for p in dense.values()),
                "parameters": values,
                "bytes": 4 * values,
            },
            "artifact": self.served,
            "dropped_tables": sorted(set(tables) - set(served_tables)),
            "dropped_parameters": sorted(set(dense) - set(kept)),
        }


def trainer_scores(
    checkpoint: Path, state: CheckpointState, surface: str, block: RequestBlock
) -> tuple[np.ndarray, nn.Module]:
    """Probabilities [C, T] of the whole trained model, unsharded and in eager mode, and that model.

    Args:
        checkpoint: what to load.
        state: of the checkpoint.
        surface: whose requests these are.
        block: the requests.
    """
    plan = state.plan
    task = checkpoints.load_task(checkpoint, plan)
    task.eval()
    empty = {
        s: block_from_arrow(
            arrow_schema(state.schema, s).empty_table().select(columns_of(state.schema, s, plan.layout.features, ())),
            state.schema,
        )
        for s in plan.keep
    }
    parts = [torch.empty(0, len(state.config.tasks))]
    with torch.inference_mode():
        for start in range(0, len(block), MAX_REQUESTS):
            inputs = assemble_inputs(empty | {surface: block.slice(start, start + MAX_REQUESTS)}, plan.layout)
            parts.append(torch.sigmoid(task.model(inputs).calibrated))
    return torch.cat(parts).numpy(), task


def _history_length(state: CheckpointState, plan: ModelPlan) -> int:
    most = state.schema.history_length
    return min(state.config.loader.history_length or most, most) if plan.layout.has_history else 0


def _table_sizes(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Rows and dimension of every table."""
    return {t: (p.shape[0], p.shape[1]) for n, p in module.named_parameters() if (t := table_of(n)) is not None}


def _copy_vocabularies(state: CheckpointState, surface: str, dataset: Dataset | None, folder: Path) -> tuple[str, ...]:
    """Copy the maps of raw keys to ids that the surface's features use; returns the vocabularies that have one."""
    if dataset is None:
        return ()
    layout = replace(state.plan, keep=(surface,)).layout
    names = [v.name for v in served_schema(state.schema, layout, surface).vocabularies]
    copied = []
    for name in names:
        source = dataset.root / VOCABULARIES / f"{name}.parquet"
        if source.is_file():
            (folder / VOCABULARIES).mkdir(exist_ok=True)
            shutil.copyfile(source, folder / VOCABULARIES / source.name)
            copied.append(name)
    return tuple(copied)


def _run_json(state: CheckpointState) -> bytes:
    run = json.loads(config_to_json(state.config))
    identity = {
        "dataset": state.dataset,
        "training_days": state.training_days,
        "epoch": state.epoch,
        "step": state.step,
    }
    return json.dumps({"run": run, "checkpoint": identity}, indent=1).encode()


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _versions() -> dict[str, str]:
    """Public versions of the libraries that the program needs."""
    return {name: importlib.metadata.version(name).partition("+")[0] for name in _LIBRARIES}
