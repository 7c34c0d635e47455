"""From a checkpoint of the unified model to the artifact of one surface."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from torch import Tensor

from components.engagement_model import EngagementModel
from pipeline.config import config_to_json
from pipeline.data.logs import Dataset
from pipeline.errors import ArtifactError, ConfigError, unknown
from pipeline.evaluate.metrics import TaskMetrics
from pipeline.progress import Progress, untold
from pipeline.serve import parity
from pipeline.serve.artifact import (
    BOUND,
    COMPILED,
    CONFIG,
    METRICS,
    MODEL,
    PARITY,
    PREPROCESSING,
    SIGNATURE,
    VOCABULARIES,
    ArtifactInfo,
    open_artifact,
    write_manifest,
)
from pipeline.serve.bound import DEFAULT_BUDGET, Budget, sweep
from pipeline.serve.delta import Delta, weights_digest, write_delta, writing
from pipeline.serve.example import made_up_requests
from pipeline.serve.program import ServingModel, compile_program, export_program, input_specs, save_program
from pipeline.serve.pruning import pruning, table_shapes
from pipeline.serve.raw import preprocessing_of
from pipeline.serve.rows import to_requests
from pipeline.serve.runtime import load_program
from pipeline.serve.scorer import Scorer
from pipeline.serve.signature import Signature, served_schema, signature_to_json
from pipeline.serve.tables import TableDtype
from pipeline.serve.trained import TrainedModel
from pipeline.train import checkpoint as checkpoints
from pipeline.train.checkpoint import CheckpointState
from pipeline.train.model_plan import ModelPlan

# Most requests in one run of the program.
MAX_REQUESTS = 256
# Most candidate slots in one run of the program: 16,384 slots and 128 events take about 100 MB of attention.
MAX_CANDIDATES = 16_384
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
    max_requests: int | None = None,
    budget: Budget = DEFAULT_BUDGET,
    compile: bool = False,
    progress: Progress = untold,
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
        max_requests: most requests in one run of the program; the scorer splits beyond it. None finds it by a sweep.
        budget: latency and memory that the sweep allows one run.
        compile: also compile with AOTInductor, which needs a C++ compiler and makes scoring faster.
        progress: told what begins.

    Raises:
        ConfigError: the model does not serve the surface.
        CheckpointError: the checkpoint is no whole one.
        DataError: the log has no rows for parity, or of another schema.
        ArtifactError: `out` is taken, or the artifact's scores are not the trainer's; nothing is left behind.
    """
    state = checkpoints.read_state(checkpoint)
    if surface not in state.config.surfaces:
        raise ConfigError(unknown("surface", surface, state.config.surfaces))
    if max_requests is not None and max_requests < 1:
        raise ConfigError(f"max_requests is {max_requests}; it must be at least 1")
    _check_free(out)
    if dataset is not None and dataset.schema != state.schema:
        raise ArtifactError(f"{dataset.root} has another schema than the log of {checkpoint}; give the log of the run")
    with writing(out, _versions()) as beside:
        key_maps = _copy_vocabularies(state, surface, dataset, beside)
        _write_preprocessing(state, surface, dataset, beside)
        job = _Job(checkpoint, state, surface, beside, dtype, key_maps)
        progress(0, 3, f"tracing {surface}" + (" and compiling it" if compile else ""))
        job.write_program(compile=compile)
        progress(1, 3, f"finding how many requests of {surface} go at once")
        scorer = job.write_signature(max_requests, budget)
        progress(2, 3, f"comparing {surface} with its trainer")
        job.write_reports(scorer, _rows(job.signature, dataset, days, parity_rows))
    return open_artifact(out)


def export_delta(
    checkpoint: Path,
    base: Path,
    out: Path,
    *,
    dataset: Dataset | None = None,
    days: tuple[str, ...] | None = None,
    parity_rows: int = 20_000,
) -> Delta:
    """Write what leads from an artifact to the same surface of a newer checkpoint of the same model, checked like one.

    Args:
        checkpoint: folder of the newer checkpoint.
        base: folder of the artifact.
        out: folder to write; must not yet exist, or be empty.
        dataset: log with held-out rows for parity; without it parity is checked on made-up rows.
        days: its held-out days; None takes its last.
        parity_rows: about how many held-out candidates to compare.

    Raises:
        CheckpointError, DataError: see `export`.
        ArtifactError: the artifact is damaged or of another model, `out` is taken, or the scores after the delta are
            not the trainer's; nothing is left behind.
    """
    state = checkpoints.read_state(checkpoint)
    info = open_artifact(base)
    signature, plan = info.signature, replace(state.plan, keep=(info.surface,))
    _check_free(out)
    if served_schema(state.schema, plan.layout, info.surface) != signature.schema or plan.layout != signature.layout:
        raise ArtifactError(f"{checkpoint} has other features or vocabularies than {base}; export a whole artifact")
    served = serving_model(plan, checkpoints.load_task(checkpoint, plan).model, signature.dtype)
    scorer = Scorer(signature, load_program(info.path, signature, compiled=False))
    before = scorer.program.tensors()
    new = {n: t.detach() for n, t in (*served.named_parameters(), *served.named_buffers()) if n in before}
    with writing(out, _versions()) as beside:
        delta = write_delta(beside, surface=info.surface, dtype=signature.dtype, base=before, new=new)
        write_manifest(beside, _versions())
        scorer.apply(beside)
        rows = _rows(signature, dataset, days, parity_rows)
        report, _ = compare_with_trainer(TrainedModel(checkpoint, state), scorer, rows)
        _write_json(beside / PARITY, report)
    return delta


def _check_free(out: Path) -> None:
    if (out.is_dir() and any(out.iterdir())) or out.is_file():
        raise ArtifactError(f"{out} already exists; choose another folder, or remove it first")


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
        key_maps: tuple[str, ...],
    ) -> None:
        self.checkpoint, self.state, self.folder = checkpoint, state, folder
        plan = replace(state.plan, keep=(surface,))
        task = checkpoints.load_task(checkpoint, plan)
        self.served = serving_model(plan, task.model, dtype)
        self.table_shapes = table_shapes(task)
        self.signature = signature_of(plan, self.served, surface, _history_length(state, plan), key_maps)

    def write_program(self, *, compile: bool) -> None:
        """Write the program, compiled too if asked, and the run's configuration."""
        example = example_tensors(self.signature)
        program = export_program(self.served, example)
        if compile:
            compile_program(program, self.folder / COMPILED)
        save_program(program, self.folder / MODEL)
        self.signature = replace(self.signature, inputs=input_specs(example))
        (self.folder / CONFIG).write_bytes(_run_json(self.state))

    def write_signature(self, max_requests: int | None, budget: Budget) -> Scorer:
        """Settle the bound on requests, write the signature, and give the scorer of what was written."""
        program = load_program(self.folder, self.signature)
        if max_requests is None:
            graph = load_program(self.folder, self.signature, compiled=False)
            max_requests, found = sweep(Scorer(self.signature, program), graph, budget)
            _write_json(self.folder / BOUND, found)
        weights = weights_digest(program.tensors())
        self.signature = replace(self.signature, max_requests=max_requests, weights=weights)
        (self.folder / SIGNATURE).write_bytes(signature_to_json(self.signature))
        return Scorer(self.signature, program)

    def write_reports(self, scorer: Scorer, rows: _Rows) -> None:
        """Score the rows with trainer and artifact, write what came out, or raise."""
        trained = TrainedModel(self.checkpoint, self.state)
        report, metrics = compare_with_trainer(trained, scorer, rows)
        _write_json(self.folder / PARITY, report)
        found = pruning(
            trained, self.served, self.table_shapes, scorer, program_bytes=(self.folder / MODEL).stat().st_size
        )
        _write_json(self.folder / METRICS, metrics | {"pruning": found})


def compare_with_trainer(
    trained: TrainedModel, scorer: Scorer, rows: _Rows
) -> tuple[dict[str, object], dict[str, object]]:
    """Hold a scorer's probabilities against the trainer's; the contents of parity.json and metrics.json.

    Raises:
        ArtifactError: they differ by more than the bounds of the type of table values.
    """
    signature = scorer.signature
    block = to_requests(rows.table, signature, "the parity rows").block
    artifact = scorer.score_block(block)
    trainer = trained.scores(signature.surface, block)
    differences = parity.compare(signature.tasks, trainer, artifact)
    parity.check(differences, signature.dtype)
    judged: list[dict[str, TaskMetrics] | None] = [
        parity.judge(rows.table, signature.surface, signature.tasks, p) if rows.labelled else None
        for p in (trainer, artifact)
    ]
    source = rows.source | {"candidates": len(artifact)}
    report = parity.report(
        dtype=signature.dtype, source=source, differences=differences, trainer=judged[0], artifact=judged[1]
    )
    metrics: dict[str, object] = {"rows": source}
    if judged[1] is not None:
        metrics["tasks"] = {task: asdict(values) for task, values in judged[1].items()}
    return report, metrics


def serving_model(plan: ModelPlan, model: EngagementModel, dtype: TableDtype) -> ServingModel:
    """A model built for one surface as what its artifact computes.

    Raises:
        ArtifactError: table values that the type cannot hold.
    """
    try:
        return ServingModel(model=model, layout=plan.layout, schema=plan.schema, dtype=dtype)
    except ValueError as error:
        raise ArtifactError(str(error)) from error


def signature_of(
    plan: ModelPlan, served: ServingModel, surface: str, history_length: int, key_maps: tuple[str, ...] = ()
) -> Signature:
    """What an artifact will say of itself, but for the inputs of its program and the bound of the sweep."""
    return Signature(
        format_version=2,
        surface=surface,
        tasks=plan.config.tasks,
        dtype=served.tables.dtype,
        history_length=history_length,
        max_requests=MAX_REQUESTS,
        max_candidates=MAX_CANDIDATES,
        schema=served_schema(plan.schema, plan.layout, surface),
        layout=plan.layout,
        tensors=served.plan,
        inputs=(),
        weights="",
        key_maps=key_maps,
    )


def example_tensors(signature: Signature) -> dict[str, Tensor]:
    """Inputs to trace a program with."""
    rows = made_up_requests(
        signature.schema, signature.surface, candidates=_EXAMPLE_CANDIDATES, history=_EXAMPLE_HISTORY
    )
    longer = replace(signature, history_length=max(_EXAMPLE_HISTORY))
    return signature.tensors.tensors(to_requests(rows, longer, "the example").block)


def _history_length(state: CheckpointState, plan: ModelPlan) -> int:
    most = state.schema.history_length
    return min(state.config.loader.history_length or most, most) if plan.layout.has_history else 0


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


def _write_preprocessing(state: CheckpointState, surface: str, dataset: Dataset | None, folder: Path) -> None:
    """Write what ingest did to the features that the surface reads, where the log says it."""
    if dataset is None:
        return
    layout = replace(state.plan, keep=(surface,)).layout
    rules = preprocessing_of(dataset.description.provenance, served_schema(state.schema, layout, surface))
    if rules is not None:
        (folder / PREPROCESSING).write_text(rules.model_dump_json(indent=1), encoding="utf-8")


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
