"""What a sweep searches: a file of fields of a recipe and the values that each may take.

metric: click/ne            # mean over surfaces; hf/click/ne is one surface's
fields:
  optimizer.dense_lr: {low: 0.0003, high: 0.01, log: true}
  model.embedding_dim: {choices: [8, 16, 32]}
  model.mixture.experts: {low: 2, high: 8}
  model.deep: {choices: [[128, 64], [256, 128]]}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import optuna
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.config import RunConfig, config_to_json, with_fields
from pipeline.errors import ConfigError, unknown
from pipeline.texts import parse_yaml

# Metric -> which direction is better.
DIRECTIONS: dict[str, Literal["minimize", "maximize"]] = {"ne": "minimize", "log_loss": "minimize", "auc": "maximize"}


class Range(BaseModel):
    """Numbers from `low` to `high`, both included; whole ones where both are written without a point."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    low: Annotated[int, Field(strict=True)] | float
    high: Annotated[int, Field(strict=True)] | float
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"low {self.low} is not below high {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"log: true wants a positive low, not {self.low}")
        return self

    def suggest(self, trial: optuna.Trial, field: str) -> float | int:
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(field, self.low, self.high, log=self.log)
        return trial.suggest_float(field, self.low, self.high, log=self.log)

    def stored(self, value: float) -> float | int:
        """A value as Optuna keeps it.

        Raises:
            ValueError: it lies outside the range.
        """
        if not self.low <= value <= self.high:
            raise ValueError(f"{value} does not lie from {self.low} to {self.high}")
        return value


class Choices(BaseModel):
    """One of several values: numbers, words, true or false, null, or lists of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    choices: Annotated[list[Any], Field(min_length=2)]

    def suggest(self, trial: optuna.Trial, field: str) -> Any:
        # Optuna keeps plain values only; the text of a list is as good a name as the list.
        return json.loads(trial.suggest_categorical(field, [json.dumps(c) for c in self.choices]))

    def stored(self, value: Any) -> str:
        """A value as Optuna keeps it.

        Raises:
            ValueError: it is no choice.
        """
        for choice in self.choices:
            if choice == value:
                return json.dumps(choice)
        raise ValueError(f"{value!r} is not among {self.choices}")


class Space(BaseModel):
    """The file, read."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    metric: str
    fields: Annotated[dict[str, Range | Choices], Field(min_length=1)]

    def stored(self, config: RunConfig) -> dict[str, Any]:
        """The recipe's own values of the fields, as Optuna keeps them.

        Raises:
            ConfigError: a value of the recipe is not among those that are searched.
        """
        found, plain = {}, json.loads(config_to_json(config))
        for field, of in self.fields.items():
            value = plain
            for section in field.split("."):
                value = value[section]
            try:
                found[field] = of.stored(value)
            except ValueError as error:
                raise ConfigError(
                    f"the recipe itself is to be the first trial, and its {field} is not searched: {error}"
                ) from error
        return found


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What trials are judged by.

    Args:
        surface: whose; None for the mean over surfaces.
        task: such as click.
        name: ne, log_loss or auc.
    """

    surface: str | None
    task: str
    name: str

    @property
    def direction(self) -> Literal["minimize", "maximize"]:
        """Which values are better."""
        return DIRECTIONS[self.name]

    def of(self, scores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> float:
        """The value in a run's metrics, as `val_metrics.json` has them: surface -> task -> metric -> [value, ...].

        Raises:
            ConfigError: the validation days of a surface do not define the metric.
        """
        surfaces = [self.surface] if self.surface is not None else list(scores)
        values = []
        for surface in surfaces:
            estimate = scores[surface][self.task].get(self.name)
            if estimate is None or estimate[0] is None:
                raise ConfigError(
                    f"the validation days of surface {surface!r} do not define {self.task}/{self.name} (one class "
                    "only?); choose another metric or longer validation days"
                )
            values.append(float(estimate[0]))
        return sum(values) / len(values)


def read_space(path: Path, config: RunConfig) -> tuple[Space, Metric]:
    """A search space and its metric, checked against the recipe that it is for.

    Raises:
        ConfigError: the file is not a search space, names a field, surface, task or metric that the recipe does not
            have, or a choice that the recipe cannot take.
    """
    try:
        space = Space.model_validate(parse_yaml(path.read_bytes()))
    except OSError as error:
        raise ConfigError(f"the search space {path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # pydantic's errors are ValueErrors too
        said = (
            "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors())
            if isinstance(error, ValidationError)
            else str(error)
        )
        raise ConfigError(f"{path} is not a search space: {said}. See `trefoil sweep --help`") from error
    for field, values in space.fields.items():
        for value in values.choices if isinstance(values, Choices) else (values.low, values.high):
            with_fields(config, {field: value}, source=str(path))
    return space, _metric(space.metric, config, str(path))


def _metric(text: str, config: RunConfig, source: str) -> Metric:
    parts = text.split("/")
    if len(parts) not in (2, 3):
        raise ConfigError(f"{source}: metric is {text!r}; write TASK/METRIC or SURFACE/TASK/METRIC, such as click/ne")
    surface = parts[0] if len(parts) == 3 else None
    task, name = parts[-2:]
    if surface is not None and surface not in config.surfaces:
        raise ConfigError(f"{source}: metric: " + unknown("surface", surface, config.surfaces))
    if task not in config.tasks:
        raise ConfigError(f"{source}: metric: " + unknown("task", task, config.tasks))
    if name not in DIRECTIONS:
        raise ConfigError(f"{source}: metric: " + unknown("metric", name, DIRECTIONS))
    return Metric(surface=surface, task=task, name=name)
