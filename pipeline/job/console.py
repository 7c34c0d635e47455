"""What a run says of itself while it goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from pipeline.config import RunConfig
from pipeline.evaluate import figures
from pipeline.progress import Progress, untold
from pipeline.tracking import Tracker
from pipeline.train.observe import rates_of
from pipeline.train.pipelining import sharded_modules
from pipeline.train.sharding import describe_plan
from pipeline.train.trainer import Trainer


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
        self._last: Mapping[str, float] = {}

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
        self.console.print(f"epoch {epoch + 1} step {step}/{steps}  loss {losses}  {rates_of(metrics)}")
        self.tracker.log_metrics(metrics, step=epoch * steps + step)
        self._last = metrics

    def log_gates(self) -> None:
        """Record how the experts were used at the last report, as a figure; nothing where the model has no gates."""
        figure = figures.gates(self._last)
        if figure is not None:
            self.tracker.log_figure(figure, "gates.png")


def precision(config: RunConfig, device: str) -> str:
    """How the dense part computes, in words."""
    compute = config.compute
    words = "bfloat16 autocast, weights float32" if compute.bf16 else "float32"
    if compute.tf32:
        words += ", TF32 products" if device == "cuda" else f" (compute.tf32 has no effect on {device})"
    words += ", deterministic" if compute.deterministic and device == "cuda" else ""
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
