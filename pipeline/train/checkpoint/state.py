"""What a checkpoint is, beside its tensors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from pipeline.config import RunConfig
from pipeline.errors import CheckpointError
from pipeline.schema import DatasetSchema
from pipeline.texts import parse_json
from pipeline.train.checkpoint.files import INDEX, MANIFEST, UNSHARDED, write_durably
from pipeline.train.model_plan import ModelPlan

STATE = "state.json"
METRICS = "metrics.json"


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """What a checkpoint is, beside its tensors.

    Args:
        format_version: of this layout.
        config: of the run.
        schema: of its log.
        moments: mean and standard deviation of each numeric feature on the training days.
        dataset: fingerprint of the log.
        training_days: days that the run trains on; in continuous training, the day in hand.
        epoch: passes finished; in continuous training, over all days so far.
        step: steps finished within the pass.
        days_done: in continuous training, the digest of each day that was trained on to its end before.
    """

    format_version: Literal[3]
    config: RunConfig
    schema: DatasetSchema
    moments: dict[str, tuple[float, float]]
    dataset: str
    training_days: tuple[str, ...]
    epoch: int
    step: int
    days_done: dict[str, str]

    @property
    def plan(self) -> ModelPlan:
        """The whole model that the checkpoint holds."""
        return ModelPlan(config=self.config, schema=self.schema, moments=self.moments, keep=self.config.surfaces)

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"epoch-{self.epoch}-step-{self.step:08d}"


_STATE = TypeAdapter(CheckpointState)


def state_to_json(state: CheckpointState) -> bytes:
    """The state as JSON."""
    return _STATE.dump_json(state, indent=1)


def read_state(checkpoint: Path) -> CheckpointState:
    """What a checkpoint, or an unsharded file beside its JSON, is.

    Raises:
        CheckpointError: it is no whole checkpoint of this version.
    """
    if checkpoint.suffix == UNSHARDED:
        path = checkpoint.with_suffix(".json")
        needed = [checkpoint, path]
    else:
        path = checkpoint / STATE
        needed = [path, checkpoint / INDEX, checkpoint / MANIFEST]
        if not path.is_file():
            raise CheckpointError(
                f"{checkpoint} is not a checkpoint: it holds no {STATE}. Give a folder below RUN/checkpoints, or a "
                f"{UNSHARDED} file that `trefoil unshard` wrote"
            )
    for file in needed:
        if not file.is_file():
            raise CheckpointError(f"{checkpoint} is damaged: {file.name} is missing; use another checkpoint")
    try:
        return _STATE.validate_json(path.read_bytes())
    except ValidationError as error:
        lines = [f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors()[:5]]
        raise CheckpointError(f"{path} does not describe a checkpoint of this version: " + "; ".join(lines)) from error


def read_metrics(checkpoint: Path) -> dict[str, float]:
    """What is known of a checkpoint's quality; empty if nothing.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = checkpoint / METRICS
    if not path.is_file():
        return {}
    try:
        return {str(k): float(v) for k, v in parse_json(path.read_bytes()).items()}
    except (ValueError, OverflowError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); remove it, only the choice of the best needs it"
        ) from error


def record_metrics(checkpoint: Path, metrics: dict[str, float]) -> None:
    """Add to what is known of a checkpoint's quality; it takes part in no checksum."""
    text = json.dumps(read_metrics(checkpoint) | metrics, indent=1) + "\n"
    write_durably(checkpoint / METRICS, text.encode())
