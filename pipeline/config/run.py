"""A run, whole: what must fit together, and its form on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError, with_config

from pipeline.config.data import DaysConfig, LoaderConfig
from pipeline.config.model import ModelConfig
from pipeline.config.strict import STRICT
from pipeline.config.training import CheckpointConfig, ComputeConfig, OptimizerConfig, ShardingConfig
from pipeline.errors import ConfigError, unknown


@with_config(STRICT)
@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run, whole."""

    name: str
    """Name of the recipe; runs of the same name are compared in one experiment."""
    surfaces: tuple[str, ...]
    """Surfaces that train and export, in batch order."""
    tasks: tuple[str, ...]
    """Labels to predict."""
    exclude: tuple[str, ...] = ()
    """Features of the log to leave out, by name or pattern (*_rate_*); history_item leaves out the history."""
    task_weights: dict[str, float] = field(default_factory=dict)
    """Weight of a task's loss; 1 where not named."""
    seed: int = 0
    """Seed of the order of data and of the initial weights."""
    epochs: int = 1
    """Passes over the training days."""
    days: DaysConfig = field(default_factory=DaysConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    timeout_s: float = 1800.0
    """A rank that finishes no step for this long is taken for hung: the stacks of all ranks are written to the run's
    folder and the job ends, for its launcher to start it again."""
    log_steps: int = 50
    """Steps between logged training metrics."""
    recalibration_prior: float | None = None
    """After training, fit the biases of the calibration once more on the validation days, each held to its trained
    value by a prior of this standard deviation, in logits (0.1: a day's rates drift by a tenth or so); none given
    leaves them."""
    recalibrates: Literal["bias", "map"] = "bias"
    """What is fitted then: the biases alone, or the whole maps, scales or slopes too, under the same prior."""
    bootstrap_resamples: int = 200
    """Resamples of users behind each interval."""

    def __post_init__(self) -> None:
        problems = (
            _at_least(
                1,
                epochs=self.epochs,
                **{"model.history.heads": self.model.history.heads},
                log_steps=self.log_steps,
                bootstrap_resamples=self.bootstrap_resamples,
                **{"checkpoint.steps": 1 if self.checkpoint.steps is None else self.checkpoint.steps},
                **{f"checkpoint.{k}": getattr(self.checkpoint, k) for k in ("keep_newest", "keep_best")},
                **{"compute.micro_batches": self.compute.micro_batches},
                **{f"loader.{k}": getattr(self.loader, k) for k in ("requests_per_batch", "lanes", "window")},
                **{
                    f"loader.{k}": 1 if getattr(self.loader, k) is None else getattr(self.loader, k)
                    for k in ("history_length", "max_candidates")
                },
            )
            + _at_least(
                0,
                **{"loader.prefetch_batches": self.loader.prefetch_batches},
                **{"days.validation": self.days.validation, "days.test": self.days.test},
                **{"optimizer.warmup_steps": self.optimizer.warmup_steps},
            )
            + self._cross_problems()
        )
        if problems:
            raise ConfigError(f"the run {self.name!r} cannot work:\n  - " + "\n  - ".join(problems))

    def _cross_problems(self) -> list[str]:
        problems = []
        if not self.surfaces:
            problems.append("surfaces is empty; name at least one")
        if not self.tasks:
            problems.append("tasks is empty; name at least one")
        if len(set(self.surfaces)) < len(self.surfaces):
            problems.append("surfaces names a surface twice")
        for task in self.task_weights:
            if task not in self.tasks:
                problems.append("task_weights: " + unknown("task", task, self.tasks))
        for surface in self.loader.surface_weights or {}:
            if surface not in self.surfaces:
                problems.append("loader.surface_weights: " + unknown("surface", surface, self.surfaces))
        if self.loader.surface_weights is not None and self.loader.temperature is not None:
            problems.append("loader.surface_weights and loader.temperature are both given; choose one")
        if self.days.first and self.days.last and self.days.first > self.days.last:
            problems.append(f"days.first {self.days.first} is after days.last {self.days.last}")
        if not self.timeout_s > 0:
            problems.append(f"timeout_s is {self.timeout_s}; it must be positive")
        prior = self.recalibration_prior
        if prior is not None:
            if not prior > 0:
                problems.append(f"recalibration_prior is {prior}; it must be above 0")
            if self.model.calibration == "none":
                problems.append("recalibration_prior is set and model.calibration is none: there is no bias to move")
            if not self.days.validation:
                problems.append("recalibration_prior is set and days.validation is 0: there is no day to fit it on")
        sharding = self.sharding
        for name, share in {
            "cache_load_factor": sharding.cache_load_factor,
            "reserved_memory": sharding.reserved_memory,
            **{f"table_cache_load_factors.{t}": v for t, v in sharding.table_cache_load_factors.items()},
        }.items():
            if not 0 < share < 1:
                problems.append(f"sharding.{name} is {share}; it must lie between 0 and 1")
        if sharding.prefetch and not sharding.pipeline:
            problems.append("sharding.prefetch needs sharding.pipeline; switch both on, or prefetch off")
        if not sharding.kernels:
            problems.append("sharding.kernels is empty; name at least one, such as fused")
        history = self.model.history
        if history.heads >= 1 and history.kind in ("transformer", "attention") and history.width % history.heads:
            problems.append(
                f"model.history.width {history.width} is not a multiple of model.history.heads {history.heads}"
            )
        if self.model.towers == "star" and self.model.mixture.kind in ("mmoe", "ple"):
            problems.append(
                "model.towers is star, which reads one vector a row, and model.mixture gives one a task; "
                "set model.mixture.kind to none or shared_bottom"
            )
        return problems


def _at_least(least: int, **values: int) -> list[str]:
    return [f"{name} is {value}; it must be at least {least}" for name, value in values.items() if value < least]


_RUN = TypeAdapter(RunConfig)


def config_to_json(config: RunConfig) -> bytes:
    """The whole configuration as JSON."""
    return _RUN.dump_json(config, indent=1)


def config_from_json(text: bytes, *, source: str) -> RunConfig:
    """A configuration read back; `source` names it in errors.

    Raises:
        ConfigError: the text is not a configuration of this version.
    """
    try:
        return _RUN.validate_json(text)
    except ValidationError as error:
        lines = [f"{'.'.join(str(p) for p in e['loc']) or 'file'}: {e['msg']}" for e in error.errors()]
        raise ConfigError(f"{source} is not a run configuration:\n  - " + "\n  - ".join(lines)) from error


def with_fields(config: RunConfig, values: Mapping[str, Any], *, source: str) -> RunConfig:
    """The configuration with some fields changed, `{"model.embedding_dim": 8}`.

    Raises:
        ConfigError: there is no such field, or it cannot take the value.
    """
    plain = json.loads(config_to_json(config))
    for name, value in values.items():
        *sections, last = name.split(".")
        place = plain
        for i, section in enumerate([*sections, last]):
            if not isinstance(place, dict) or section not in place:
                known = place if isinstance(place, dict) else ()
                inside = ".".join(sections[:i])
                raise ConfigError(f"{source}: " + unknown(f"field of {inside or 'the recipe'}", section, known))
            if i < len(sections):
                place = place[section]
        place[last] = value
    return config_from_json(json.dumps(plain).encode(), source=f"{source} ({', '.join(map(str, values))})")


def flat_config(config: RunConfig) -> dict[str, str]:
    """Every field as `section.field`, for run tables."""

    def walk(prefix: str, value: Any) -> dict[str, str]:
        if isinstance(value, dict) and value:
            return {k: v for name, part in value.items() for k, v in walk(f"{prefix}{name}.", part).items()}
        return {prefix.rstrip("."): str(value)}

    return walk("", _RUN.dump_python(config, mode="json"))


def default_home() -> Path:
    """Where runs are kept: `TREFOIL_HOME`, or `runs` in the current folder."""
    return Path(os.environ.get("TREFOIL_HOME", "runs"))
