"""What happens inside the unified model: use of experts, gradient conflict, and whose rows gain.

    python -m benchmarks.diagnostics --data KUAIRAND_LOG --work runs/quality

Trains the unified recipe with MMoE on the days up to the one before the last two, reads its gates and its surfaces'
gradients on batches of the validation day, at the first step's weights and at the last's, and compares the finished
runs of `benchmarks.quality` (arms `unified` and `separate`) by where training saw each user.

What it does not show: conflict along the whole run, or on tables; cause of the gain.
"""

from __future__ import annotations

import itertools
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from benchmarks.common import Report
from pipeline.config import DaysConfig


@dataclass(frozen=True, kw_only=True)
class Settings:
    data: Path | None = None
    """Folder of the log that `trefoil ingest kuairand` wrote; without it nothing is measured, and says so."""
    work: Path = Path("runs/quality")
    """Where benchmarks.quality keeps finished runs."""
    last: str | None = None
    """Last day of the log to use, for a shorter training; none given is the log's last."""
    batches: int = 20
    """Batches of 1,024 requests that gates and gradients are read on."""
    task: str = "click"
    """Task of the gain by users."""
    resamples: int = 1000
    """Resamples of users behind each interval."""
    quick: bool = False
    """Few batches, an untrained model: does it run, not what is true."""


def inside(settings: Settings, data: Path) -> dict[str, Any]:
    """Gates and gradients, before training and after it."""
    import torch

    from pipeline.data.loader import Loader
    from pipeline.data.logs import Dataset
    from pipeline.recipes.kuairand import PARTS
    from pipeline.train.build import build_task
    from pipeline.train.checkpoint import load_task
    from pipeline.train.diagnostics import gate_utilisation, gradient_conflict
    from pipeline.train.sharding import joined
    from pipeline.train.trainer import Trainer

    torch.set_num_threads(1)
    dataset = Dataset.open(data)
    config = replace(PARTS["mmoe"](), days=DaysConfig(last=settings.last, validation=1, test=1))
    folder = settings.work / "diagnostics"
    with joined() as ranks:
        trainer = Trainer(config, dataset, ranks, folder)
        torch.manual_seed(config.seed)
        models = {"untrained": build_task(trainer.plan, table_device=torch.device("cpu"))}
        if not settings.quick:
            models["trained"] = load_task(trainer.train())
        shutil.rmtree(folder, ignore_errors=True)
    found: dict[str, Any] = {}
    for name, task in models.items():
        loader = Loader(
            dataset,
            trainer.plan.layout,
            replace(config.loader, requests_per_batch=1024),
            days=trainer.days.validation,
            seed=0,
        )
        batches = list(itertools.islice(loader.batches(0), settings.batches))
        gates = gate_utilisation(task, batches)
        conflict = gradient_conflict(task, batches)
        found[name] = {
            "gates": {
                s: {
                    t: {"utilisation": load.utilisation[i].tolist(), "entropy": float(load.entropy[i])}
                    for i, t in enumerate(config.tasks)
                }
                for s, load in gates.items()
            },
            "gradient_conflict": {f"{a}-{b}": asdict(c) for (a, b), c in conflict.items()},
        }
    return found


def overlap(settings: Settings, data: Path) -> dict[str, Any]:
    """Gain of the unified over the separate models by where training saw the user, from kept predictions."""
    import polars as pl

    from pipeline.data.flat import impressions, item_feature
    from pipeline.data.logs import Dataset
    from pipeline.evaluate.overlap import gain_by_overlap
    from pipeline.evaluate.predictions import DATE, Predictions, read_predictions
    from pipeline.train.days import split_days

    dataset = Dataset.open(data)
    arms = {}
    for arm in ("unified", "separate"):
        files = sorted((settings.work / arm).glob("*-0.parquet"))
        if not files:
            return {"skipped": f"no finished run of {arm} in {settings.work}; run benchmarks.quality first"}
        parts = [read_predictions(f) for f in files]
        arms[arm] = Predictions.concat(p.select(dates=(p.dates[-1],)) for p in parts)
    days = sorted(set(arms["unified"].dates) & set(arms["separate"].dates))
    chosen = {arm: Predictions(p.table.filter(pl.col(DATE).is_in(days))) for arm, p in arms.items()}
    seen: dict[tuple[str, str], set[int]] = {}
    for day in days:
        rows = impressions(
            dataset,
            surfaces=arms["unified"].surfaces,
            tasks=(settings.task,),
            days=split_days(dataset, DaysConfig(last=day, validation=1, test=1)).train,
            item=item_feature(dataset.schema),
        )
        for surface, users in rows.group_by("surface").agg(pl.col("user_id").unique()).collect().iter_rows():
            seen[day, surface] = set(users)
    gains = gain_by_overlap(
        chosen["unified"], chosen["separate"], seen, task=settings.task, resamples=settings.resamples
    )
    return {
        s: {
            g: {"row_share": v.row_share, "gain": v.gain.as_list(), "gain_share": v.gain_share.as_list()}
            for g, v in groups.items()
        }
        for s, groups in gains.items()
    }


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    if settings.quick:
        settings = replace(settings, batches=2, resamples=100)
    report = Report("diagnostics", settings)
    if settings.data is None:
        return report.finish({"skipped": "give --data, a log written by `trefoil ingest kuairand`"})
    report.finish({**inside(settings, settings.data), "gain_by_users": overlap(settings, settings.data)})


if __name__ == "__main__":
    main()
