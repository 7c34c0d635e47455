"""Models of a wave on disk: trained, exported, opened."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from pipeline import job
from pipeline.config import RunConfig
from pipeline.data.logs import Dataset
from pipeline.errors import ConfigError
from pipeline.evaluate.predictions import Predictions
from pipeline.progress import Bar
from pipeline.rollout.quality import score_days
from pipeline.rollout.waves import Rung, Serving
from pipeline.schema import Kind
from pipeline.serve.artifact import open_artifact
from pipeline.serve.export import export
from pipeline.serve.scorer import Scorer
from pipeline.train import checkpoint as checkpoints
from pipeline.train.build import build_task
from pipeline.train.days import split_days
from pipeline.train.model_plan import model_plan
from pipeline.train.quiet import quiet_dependencies
from pipeline.train.sharding import joined
from pipeline.train.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class Built:
    """A model of the ladder, ready to be judged.

    Args:
        rung: what it is.
        checkpoint: trained.
        artifacts: by surface.
        scored: by surface, on the evaluation days, as served.
    """

    rung: Rung
    checkpoint: Path
    artifacts: Mapping[str, Path]
    scored: Mapping[str, Predictions]

    @property
    def predictions(self) -> Predictions:
        """Of all surfaces."""
        return Predictions.concat(self.scored.values())


def train(
    config: RunConfig,
    data: Path,
    folder: Path,
    *,
    parent: str | None,
    wave: int,
    warm: Path | None,
    console: Console,
) -> Path:
    """Train in this process, or go on with what the folder holds; returns the checkpoint.

    Args:
        config: the run.
        data: folder of the log.
        folder: of the run; its output goes to `log.txt` there.
        parent: key of the wave's tracker.
        wave: its number.
        warm: checkpoint whose weights to start from.
        console: told in one line.

    Raises:
        TrefoilError: the run does not fit the log, or the folder holds another run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fresh = _grown(config, data, warm) if warm is not None else ()
    console.print(f"  training {folder.name}: {', '.join(config.surfaces)}; {', '.join(config.tasks)} ...", style="dim")
    with (folder / "log.txt").open("a", encoding="utf-8") as log, Bar(console, "steps") as bar:
        result = job.run(
            config,
            data,
            folder,
            console=Console(file=log, width=160, highlight=False),
            warm=warm,
            fresh=fresh,
            parent=parent,
            tags={"wave": str(wave)},
            progress=bar,
        )
    if result.stopped:
        raise ConfigError(f"training was told to stop; run the same command again to go on from {result.checkpoint}")
    return result.checkpoint


def first_weights(config: RunConfig, dataset: Dataset, folder: Path) -> Path:
    """A checkpoint of an untrained model: what it costs to serve does not depend on its weights."""
    with joined() as ranks:
        trainer = Trainer(config, dataset, ranks, folder)
        trainer.save()
        trainer.writer.finish()
    found = checkpoints.newest(folder)
    assert found is not None, "one was just written"
    return found


def export_all(
    checkpoint: Path,
    surfaces: tuple[str, ...],
    serving: Serving,
    folder: Path,
    dataset: Dataset | None,
    *,
    days: tuple[str, ...],
    unique_users: int,
) -> dict[str, Path]:
    """An artifact of each surface, checked against the trainer; one that is there and whole is taken as it is.

    The bound on unique users is the plan's. A sweep would find one by the clock, and another on a busy machine: the
    same plan and log must give the same decisions.
    """
    quiet_dependencies()
    made = {}
    for surface in surfaces:
        out = folder / f"{surface}-{serving.dtype}{'-compiled' if serving.compiled else ''}"
        if out.is_dir():
            open_artifact(out)
        else:
            shutil.rmtree(out, ignore_errors=True)
            export(
                checkpoint,
                surface,
                out,
                dataset=dataset,
                days=days or None,
                dtype=serving.dtype,
                compile=serving.compiled,
                max_requests=unique_users,
            )
        made[surface] = out
    return made


def score_all(artifacts: Mapping[str, Path], dataset: Dataset, days: tuple[str, ...]) -> dict[str, Predictions]:
    """Scores of each surface's artifact on these days."""
    return {surface: score_days(Scorer.open(path), dataset, days) for surface, path in artifacts.items()}


def _grown(config: RunConfig, data: Path, warm: Path) -> tuple[str, ...]:
    """Dense parameters that have another shape than in the checkpoint, because the run has more surfaces.

    They keep their first values; everything else of the same name is taken.
    """
    dataset = Dataset.open(data)
    days = split_days(dataset, config.days).train
    moments = {f.name: dataset.numeric_moments(f.name, days) for f in dataset.schema.select(kind=Kind.NUMERIC)}
    meta = torch.device("meta")
    shapes = [
        {
            name.removeprefix("model."): tuple(p.shape)
            for name, p in build_task(of, table_device=meta).named_parameters()
        }
        for of in (checkpoints.read_state(warm).plan, model_plan(config, dataset.schema, moments))
    ]
    return tuple(n for n, shape in shapes[1].items() if shapes[0].get(n, shape) != shape)
