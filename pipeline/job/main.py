"""A run in one page: train, judge, keep the record; then export and register where that is asked for."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.config import RunConfig
from pipeline.data.logs import Dataset
from pipeline.evaluate.compare import Comparison
from pipeline.evaluate.report import as_dict
from pipeline.job.console import ConsoleReporter
from pipeline.job.judging import judge_days
from pipeline.job.membership import member, write_status
from pipeline.job.record import experiment_of, start_tracker
from pipeline.progress import Bar, Progress
from pipeline.publish import export_surface, register_artifact
from pipeline.serve.bound import DEFAULT_BUDGET, Budget
from pipeline.train import checkpoint
from pipeline.train.days import split_days
from pipeline.train.trainer import Trainer


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
            tracker.set_tags({"checkpoint": str(path.absolute())})
            reporter.log_gates()
            comparison = None if trainer.stopped else judge_days(trainer, folder, console, tracker)
        write_status(folder, ranks, "pre-empted" if trainer.stopped else "finished", checkpoint=path.name)
        return JobResult(
            folder=folder, checkpoint=path, stopped=trainer.stopped, comparison=comparison, run_key=tracker.key
        )


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


def register(result: JobResult, data: Path, *, console: Console, budget: Budget = DEFAULT_BUDGET) -> dict[str, Any]:
    """Export every surface of a finished job, checked on its test days, and register each as challenger.

    Args:
        result: of the job.
        data: folder of its log.
        console: where to tell of each artifact.
        budget: what a run of an exported program may cost on this machine.

    Raises:
        ArtifactError: an artifact's scores are not the trainer's, or not even one request stays within the budget;
            surfaces before it stay registered.
        RegistryError: MLflow cannot be reached or fails.
    """
    dataset = Dataset.open(data)
    state = checkpoint.read_state(result.checkpoint)
    days = split_days(dataset, state.config.days).test or None
    registered = {}
    for surface in state.config.surfaces:
        artifact = result.folder / "artifacts" / surface
        shutil.rmtree(artifact, ignore_errors=True)
        exported = export_surface(
            result.checkpoint, surface, artifact, dataset=dataset, days=days, budget=budget, console=console
        )
        registered[surface] = exported | register_artifact(
            artifact,
            experiment=experiment_of(state.config),
            folder=result.folder / "exports" / surface,
            parent=result.run_key,
            console=console,
        )
    return registered


def summary(result: JobResult) -> dict[str, Any]:
    """The job's result as JSON-able values."""
    compared = as_dict(result.comparison) if result.comparison is not None else None
    return {
        "run": str(result.folder),
        "checkpoint": str(result.checkpoint),
        "stopped": result.stopped,
        "test": compared,
    }
