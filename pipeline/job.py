"""The main job: train, judge, keep the record. Export and registration follow where they are asked for."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.config import RunConfig, config_from_json, config_to_json, default_home, flat_config
from pipeline.data.logs import Dataset
from pipeline.errors import ConfigError, without_passwords
from pipeline.evaluate import figures
from pipeline.evaluate.compare import Comparison
from pipeline.evaluate.predictions import Predictions
from pipeline.evaluate.report import MODEL, as_dict, print_report
from pipeline.progress import Bar, Progress, untold
from pipeline.publish import export_surface, register_artifact
from pipeline.tracking import Tracker, metric_name
from pipeline.train import checkpoint
from pipeline.train.days import split_days
from pipeline.train.judge import PredictionCollector, gather, judge
from pipeline.train.observe import rates_of
from pipeline.train.pipelining import sharded_modules
from pipeline.train.sharding import Ranks, describe_plan, joined
from pipeline.train.supervision import Supervision, stacks_file
from pipeline.train.trainer import Trainer

CONFIG = "config.json"
METRICS = "metrics.json"
STATUS = "status.json"
TORCHX_JOB = "TORCHX_JOB_ID"
# A rank that hangs writes its stacks this much before the others give up waiting for it.
COLLECTIVE_MARGIN_S = 60.0
# How long a job waits for the one before it to leave its folder: as long as ranks may take that were told to leave.
FOLDER_PATIENCE_S = 120.0


@dataclass(frozen=True, kw_only=True)
class JobResult:
    """What a finished job leaves behind.

    Args:
        folder: of the run.
        checkpoint: the last one.
        stopped: whether the run was told to leave before its end; run again, it goes on.
        comparison: the model on the test days beside its baselines; None on ranks other than the first.
        run_key: key of the run's tracker; None on ranks other than the first.
    """

    folder: Path
    checkpoint: Path
    stopped: bool
    comparison: Comparison | None
    run_key: str | None


def run(
    config: RunConfig,
    data: Path,
    folder: Path,
    *,
    console: Console,
    warm: Path | None = None,
    fresh: tuple[str, ...] = (),
    tags: Mapping[str, str] | None = None,
    parent: str | None = None,
    profile_steps: tuple[int, int] | None = None,
    progress: Progress | None = None,
) -> JobResult:
    """Train, validate and test; every rank calls this. A folder that holds checkpoints is gone on with.

    On SIGTERM all ranks save after the same step and return (`JobResult.stopped`).

    Args:
        config: the run.
        data: folder of the log.
        folder: of the run: config.json, checkpoints/, predictions/, metrics.json.
        console: where the first rank tells of progress.
        warm: checkpoint of another run whose weights to start from, where the folder holds no checkpoint yet.
        fresh: names or patterns of what keeps its first values all the same.
        tags: of the run in MLflow, beside our own.
        parent: key of the tracker of the run that this one is part of.
        profile_steps: first and last step to write a profiler's trace of.
        progress: told of every step of the first rank; None draws it on the console.

    Raises:
        TrefoilError: the run does not fit the log, or the folder holds another run.
    """
    dataset = Dataset.open(data)
    with member(config, folder) as (ranks, supervision):
        with (
            start_tracker(config, dataset, folder, ranks, tags=tags, parent=parent) as tracker,
            Bar(console, "steps") as bar,
        ):
            reporter = ConsoleReporter(console, tracker, progress or bar)
            trainer = Trainer(
                config, dataset, ranks, folder / "checkpoints", reporter, supervision, profile_steps=profile_steps
            )
            if not go_on(trainer, folder, console) and warm is not None:
                start_warm(trainer, warm, fresh, folder, console)
            path = trainer.train()
            comparison = None if trainer.stopped else _judge(trainer, folder, console, tracker)
        write_status(folder, ranks, "pre-empted" if trainer.stopped else "finished", checkpoint=path.name)
        return JobResult(
            folder=folder, checkpoint=path, stopped=trainer.stopped, comparison=comparison, run_key=tracker.key
        )


@contextmanager
def member(config: RunConfig, folder: Path) -> Iterator[tuple[Ranks, Supervision]]:
    """This process as a rank of a run: told of SIGTERM, watched, its state written to RUN/status.json.

    Raises:
        ConfigError: the folder holds a run of another configuration.
    """
    stacks = stacks_file(folder, int(os.environ.get("RANK", "0")))
    with (
        Supervision(stacks, config.timeout_s) as supervision,
        # Ranks that wait for a hung one must outlive the watch, so that it can write their stacks too.
        _watched(supervision, joined(timeout_s=config.timeout_s + COLLECTIVE_MARGIN_S)) as ranks,
        _alone(folder, ranks, patience_s=min(FOLDER_PATIENCE_S, config.timeout_s)),
    ):
        if ranks.is_first:
            _claim(folder, config)
            write_status(folder, ranks, "running")
        ranks.barrier()
        try:
            yield ranks, supervision
        except BaseException as error:
            write_status(folder, ranks, "failed", error=without_passwords(error).splitlines()[:1])
            raise


@contextmanager
def _watched(supervision: Supervision, joining: AbstractContextManager[Ranks]) -> Iterator[Ranks]:
    """The ranks, joined under watch: if the first stops before, the others would wait in its store for ever."""
    supervision.beat()
    with joining as ranks:
        supervision.rest()
        yield ranks


@contextmanager
def _alone(folder: Path, ranks: Ranks, *, patience_s: float) -> Iterator[None]:
    """Hold the folder of the run: ranks that outlived their launcher would write beside those that take over.

    Raises:
        ConfigError: another job has been at work in the folder for too long.
    """
    if not ranks.is_first:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    end, told = time.monotonic() + patience_s, False
    with (folder / ".lock").open("a+") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it when the process dies
                break
            except BlockingIOError:
                file.seek(0)
                if time.monotonic() > end:
                    raise ConfigError(
                        f"another job is at work in {folder} ({file.read().strip()}); wait for it or stop it, or give "
                        "another --run-dir"
                    ) from None
                if not told:
                    print(f"waiting up to {patience_s:g} s for the job before to leave {folder}", file=sys.stderr)
                told = True
                time.sleep(0.1)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def write_status(folder: Path, ranks: Ranks, state: str, **more: object) -> None:
    """Say in RUN/status.json how far a run is: running, pre-empted, finished or failed. The first rank writes."""
    if ranks.is_first:
        status = {"state": state, "ranks": ranks.world_size, "time": datetime.now(UTC).isoformat(), **more}
        beside = folder / f".{STATUS}.writing"
        beside.write_text(json.dumps(status, indent=1) + "\n")
        os.replace(beside, folder / STATUS)


def go_on(trainer: Trainer, folder: Path, console: Console) -> bool:
    """Resume from the newest checkpoint that is whole; returns whether there was one.

    Raises:
        CheckpointError: no checkpoint of the folder is whole, or they are of another run.
    """
    path, problems = trainer.writer.shelf.newest_good(trainer.ranks)
    if path is not None:
        trainer.resume(path)
    if trainer.ranks.is_first:
        for problem in problems:
            console.print(f"warning: {problem.removesuffix('; use another checkpoint')}; set aside as NAME.damaged")
        if path is not None:
            console.print(f"going on from {path}")
        for stacks in sorted((folder / "stacks").glob("*.txt")):
            if stacks.stat().st_size:
                console.print(f"note: a rank hung before; its stacks are in {stacks}")
    return path is not None


def start_tracker(
    config: RunConfig,
    dataset: Dataset,
    folder: Path,
    ranks: Ranks,
    *,
    tags: Mapping[str, str] | None = None,
    parent: str | None = None,
) -> Tracker:
    """The record of a run, with further tags and a parent if given; only the first rank's goes anywhere."""
    tracker = Tracker.start(
        folder.name,
        run_dir=folder,
        root=default_home(),
        experiment=experiment_of(config),
        tags={**(tags or {}), **_tags(config, dataset, ranks), "run_dir": str(folder.absolute())},
        params=flat_config(config),
        parent=parent,
        rank=ranks.rank,
    )
    root = dataset.root.absolute()
    tracker.log_dataset(root.name, digest=dataset.fingerprint, source=str(root), context="training")
    return tracker


def start_warm(trainer: Trainer, warm: Path, fresh: tuple[str, ...], folder: Path, console: Console) -> None:
    """Take another run's weights and tell what became of each table; all of it goes to RUN/warm_start.json.

    Raises:
        CheckpointError: the checkpoint is damaged, or does not fit.
    """
    checkpoint.verify(warm, part=trainer.ranks.rank, parts=trainer.ranks.world_size)
    report = checkpoint.warm_start(warm, trainer.model, trainer.dataset.schema, fresh=fresh)
    if not trainer.ranks.is_first:
        return
    table = Table(title="warm start")
    for heading in ("table", "", "in the checkpoint", "here"):
        table.add_column(heading)
    for row in report:
        if row.is_table:
            table.add_row(row.name, row.fate, *("x".join(map(str, s)) if s else "-" for s in (row.source, row.target)))
    console.print(table)
    fates = Counter(row.fate for row in report if not row.is_table)
    console.print("dense parameters: " + (", ".join(f"{n} {fate}" for fate, n in sorted(fates.items())) or "none"))
    (folder / "warm_start.json").write_text(json.dumps([asdict(row) for row in report], indent=1) + "\n")


def register(result: JobResult, data: Path, *, console: Console) -> dict[str, Any]:
    """Export every surface of a finished job, checked on its test days, and register each as challenger.

    Raises:
        ArtifactError: an artifact's scores are not the trainer's; surfaces before it stay registered.
        RegistryError: MLflow cannot be reached or fails.
    """
    dataset = Dataset.open(data)
    state = checkpoint.read_state(result.checkpoint)
    days = split_days(dataset, state.config.days).test or None
    registered = {}
    for surface in state.config.surfaces:
        artifact = result.folder / "artifacts" / surface
        shutil.rmtree(artifact, ignore_errors=True)
        exported = export_surface(result.checkpoint, surface, artifact, dataset=dataset, days=days, console=console)
        registered[surface] = exported | register_artifact(
            artifact,
            experiment=experiment_of(state.config),
            folder=result.folder / "exports" / surface,
            parent=result.run_key,
            console=console,
        )
    return registered


def experiment_of(config: RunConfig) -> str:
    """MLflow's experiment of a recipe's runs."""
    return f"trefoil/{config.name}"


def _claim(folder: Path, config: RunConfig) -> None:
    """Write the run's configuration; a folder of another run is an error."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CONFIG
    if path.exists() and config_from_json(path.read_bytes(), source=str(path)) != config:
        raise ConfigError(
            f"{folder} holds a run of another configuration; give the same recipe and flags to go on with it, "
            "or another --run-dir to start anew"
        )
    path.write_bytes(config_to_json(config))


def _tags(config: RunConfig, dataset: Dataset, ranks: Ranks) -> dict[str, str]:
    return {
        "recipe": config.name,
        "seed": str(config.seed),
        "surfaces": ",".join(config.surfaces),
        "surface": config.surfaces[0] if len(config.surfaces) == 1 else "several",
        "dataset": dataset.fingerprint,
        "data": str(dataset.root.absolute()),
        "world_size": str(ranks.world_size),
        "device": ranks.device.type,
        "code": code_version(),
        # The handle of TorchX's job, for `torchx status` and `torchx log`.
        **({"torchx_job": os.environ[TORCHX_JOB]} if TORCHX_JOB in os.environ else {}),
    }


def code_version() -> str:
    """The commit of the code, with a mark if it was changed since; "unknown" outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def _judge(trainer: Trainer, folder: Path, console: Console, tracker: Tracker) -> Comparison | None:
    """Score validation and test days on all ranks; the first compares and reports."""
    comparison = None
    for split, days in (("val", trainer.days.validation), ("test", trainer.days.test)):
        if not days:
            continue
        collector = PredictionCollector(trainer.config.surfaces, trainer.config.tasks)
        trainer.predict(days, collector.add)
        if trainer.stopped:
            return None
        predictions = gather(collector, folder / "predictions" / f"{split}.parquet", trainer.ranks, trainer.dataset)
        if predictions is not None:
            comparison = _report(trainer, split, predictions, folder, console, tracker)
    return comparison


def _report(
    trainer: Trainer, split: str, predictions: Predictions, folder: Path, console: Console, tracker: Tracker
) -> Comparison:
    comparison = judge(predictions, trainer.dataset, trainer.days.train, resamples=trainer.config.bootstrap_resamples)
    values = {
        metric_name(surface, task, metric, split=split): estimate.value
        for surface, tasks in comparison.scores[MODEL].items()
        for task, score in tasks.items()
        for metric, estimate in score.estimates.items()
        if estimate.value is not None
    }
    tracker.log_metrics(values, step=trainer.total_steps)
    path = folder / f"{split}_{METRICS}"
    path.write_text(json.dumps({"days": predictions.dates, **as_dict(comparison)}, indent=1) + "\n")
    tracker.log_artifact(path)
    for task in trainer.config.tasks:
        tracker.log_figure(figures.reliability({MODEL: predictions}, task=task), f"{split}_{task}_reliability.png")
        tracker.log_figure(figures.roc({MODEL: predictions}, task=task), f"{split}_{task}_roc.png")
    if split == "test":
        console.print(f"\nTest days {', '.join(predictions.dates)}:")
        print_report(comparison, console=console)
    return comparison


class ConsoleReporter:
    """Progress of a run, for a person and for MLflow.

    Args:
        console: where to print.
        tracker: where to record.
        step: told of every step.
    """

    def __init__(self, console: Console, tracker: Tracker, step: Progress = untold) -> None:
        self.console = console
        self.tracker = tracker
        self.step = step

    def plan(self, trainer: Trainer) -> None:
        """Print the sharding plan, sizes and days at the start."""
        config, ranks = trainer.config, trainer.ranks
        self.console.print(
            f"recipe {config.name}: {ranks.world_size} rank(s) on {ranks.device.type}, "
            f"{trainer.loader.steps} steps an epoch, {config.epochs} epoch(s); training days "
            f"{trainer.days.train[0]} to {trainer.days.train[-1]}, "
            f"validation {', '.join(trainer.days.validation) or 'none'}, test {', '.join(trainer.days.test) or 'none'}"
        )
        sizes = ", ".join(f"{s} {n:,}" for s, n in trainer.loader.sizes.items())
        self.console.print(f"requests an epoch: {sizes}; dense parameters: {trainer.dense_parameters:,}")
        self.console.print(precision(config, ranks.device.type))
        rows = describe_plan(trainer.model.plan, config.optimizer)
        self.console.print(_plan_table(rows))
        modules = list(sharded_modules(trainer.model))
        self.console.print(
            f"dense optimizer {config.optimizer.dense}, learning rate {config.optimizer.dense_lr:g}; "
            f"embeddings travel as {config.sharding.exchange}; pipelined: "
            + (f"{', '.join(modules)}" if config.sharding.pipeline else "nothing (sharding.pipeline is off)"),
            soft_wrap=True,
        )
        plan = {
            "tables": rows,
            "exchange": config.sharding.exchange,
            "dense_optimizer": config.optimizer.dense,
            "pipelined": modules if config.sharding.pipeline else [],
        }
        self.tracker.log_text(json.dumps(plan, indent=1), "sharding_plan.json")

    def progress(self, *, epoch: int, step: int, steps: int, metrics: Mapping[str, float]) -> None:
        """Print and record one report."""
        losses = "  ".join(
            f"{n.split('/')[1]} {v:.4f}" for n, v in metrics.items() if n.startswith("train/") and n.endswith("/loss")
        )
        self.console.print(f"epoch {epoch} step {step}/{steps}  loss {losses}  {rates_of(metrics)}")
        self.tracker.log_metrics(metrics, step=epoch * steps + step)


def precision(config: RunConfig, device: str) -> str:
    """How the dense part computes, in words."""
    compute = config.compute
    words = "bfloat16 autocast, weights float32" if compute.bf16 else "float32"
    if compute.tf32:
        words += ", TF32 products" if device == "cuda" else f" (compute.tf32 has no effect on {device})"
    words += ", compiled" if compute.compile else ""
    words += f", in {compute.micro_batches} micro-batches" if compute.micro_batches > 1 else ""
    return f"dense part: {words}"


def _plan_table(rows: list[dict[str, object]]) -> Table:
    columns = ("module", "table", "rows", "dim", "dtype", "sharding", "kernel", "optimizer", "lr", "ranks")
    table = Table(title="embedding tables")
    for heading in columns:
        table.add_column(heading, justify="right" if heading in ("rows", "dim", "lr") else "left")
    for row in rows:
        table.add_row(*(str(row[c]) for c in columns))
    return table


def is_first() -> bool:
    """Whether this process is the one that speaks for all ranks."""
    return os.environ.get("RANK", "0") == "0"


def is_worker() -> bool:
    """Whether a launcher (torchrun, TorchX) started this process as one of its ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def summary(result: JobResult) -> dict[str, Any]:
    """The job's result as JSON-able values."""
    compared = as_dict(result.comparison) if result.comparison is not None else None
    return {
        "run": str(result.folder),
        "checkpoint": str(result.checkpoint),
        "stopped": result.stopped,
        "test": compared,
    }
