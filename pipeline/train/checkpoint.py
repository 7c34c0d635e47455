"""Checkpoints: torch.distributed.checkpoint beside one JSON file that says what it is.

    CHECKPOINT/state.json     run, schema, moments, data set, epoch, step
    CHECKPOINT/.metadata, *.distcp

Written beside its place and then renamed, so a folder of that name is always whole. Loads at any number of
ranks and under any plan; `load_unsharded` reads plain tensors without a process group.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed.checkpoint as dcp
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import KeyedOptimizer

from pipeline.config import RunConfig
from pipeline.errors import CheckpointError
from pipeline.schema import DatasetSchema
from pipeline.train.build import ModelPlan
from pipeline.train.quiet import quiet_dependencies
from pipeline.train.sharding import Ranks

STATE = "state.json"


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
        training_days: days that the run trains on.
        epoch: passes finished.
        step: steps finished within the pass.
    """

    format_version: Literal[1]
    config: RunConfig
    schema: DatasetSchema
    moments: dict[str, tuple[float, float]]
    dataset: str
    training_days: tuple[str, ...]
    epoch: int
    step: int

    @property
    def plan(self) -> ModelPlan:
        """The whole model that the checkpoint holds."""
        return ModelPlan(config=self.config, schema=self.schema, moments=self.moments, keep=self.config.surfaces)


_STATE = TypeAdapter(CheckpointState)


def save(
    folder: Path, state: CheckpointState, model: DistributedModelParallel, optimizer: KeyedOptimizer, ranks: Ranks
) -> Path:
    """Write `folder/epoch-E-step-S`; every rank calls this. Returns its path."""
    target = folder / f"epoch-{state.epoch}-step-{state.step:08d}"
    beside = folder / f".{target.name}.writing"
    if ranks.is_first:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    ranks.barrier()
    dcp.save(_tensors(model, optimizer), checkpoint_id=str(beside))
    if ranks.is_first:
        (beside / STATE).write_bytes(_STATE.dump_json(state, indent=1))
        if target.exists():
            shutil.rmtree(target)
        os.replace(beside, target)
    ranks.barrier()
    return target


def read_state(checkpoint: Path) -> CheckpointState:
    """What a checkpoint is.

    Raises:
        CheckpointError: the folder is no whole checkpoint of this version.
    """
    path = checkpoint / STATE
    if not path.is_file():
        raise CheckpointError(
            f"{checkpoint} is not a checkpoint: it holds no {STATE}. Give a folder below RUN/checkpoints"
        )
    if not (checkpoint / ".metadata").is_file():
        raise CheckpointError(
            f"{checkpoint} is damaged: its tensors' index .metadata is missing; use another checkpoint"
        )
    try:
        return _STATE.validate_json(path.read_bytes())
    except ValidationError as error:
        lines = [f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors()[:5]]
        raise CheckpointError(f"{path} does not describe a checkpoint of this version: " + "; ".join(lines)) from error


def newest(folder: Path) -> Path | None:
    """The checkpoint in a run's folder that has trained longest, or None."""
    found = [
        (int(m[1]), int(m[2]), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (m := re.fullmatch(r"epoch-(\d+)-step-(\d+)", path.name))
    ]
    return max(found)[2] if found else None


def resume(
    checkpoint: Path, expected: CheckpointState, model: DistributedModelParallel, optimizer: KeyedOptimizer
) -> CheckpointState:
    """Load weights and optimizer state in place; every rank calls this, whatever number wrote it.

    Args:
        checkpoint: what to load.
        expected: what this run would write now; its model, data and order must be those of the checkpoint.

    Raises:
        CheckpointError: the checkpoint is of another run, schema or data set, or is damaged.
    """
    state = read_state(checkpoint)
    differ = [
        name
        for name in ("schema", "dataset", "training_days", "moments")
        if getattr(state, name) != getattr(expected, name)
    ]
    mine, theirs = asdict(expected.config), asdict(state.config)
    free = {"sharding", "checkpoint_steps", "log_steps", "bootstrap_resamples", "tf32"}
    differ += [f"config.{k}" for k in mine if k not in free and mine[k] != theirs[k]]
    if differ:
        raise CheckpointError(
            f"{checkpoint} cannot be resumed by this run: {', '.join(differ)} differ. "
            "Start a new run, or use the recipe, flags and log that the checkpoint was made with"
        )
    _prime(model, optimizer)
    tensors = _tensors(model, optimizer)
    try:
        dcp.load(tensors, checkpoint_id=str(checkpoint))
    except dcp.CheckpointException as error:
        raise CheckpointError(f"{checkpoint} cannot be read: {_first_line(error)}") from error
    model.load_state_dict(tensors["model"])
    optimizer.load_state_dict(tensors["optimizer"])
    optimizer.post_load_state_dict()
    return state


def load_unsharded(checkpoint: Path, module: nn.Module) -> None:
    """Fill a single-device module, whole or pruned, from a checkpoint; needs no process group.

    Raises:
        CheckpointError: the checkpoint lacks a parameter of the module, or is damaged.
    """
    quiet_dependencies()
    tensors = {"model": module.state_dict()}
    try:
        dcp.load(tensors, checkpoint_id=str(checkpoint), no_dist=True)
    except (dcp.CheckpointException, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint} does not hold this model: {_first_line(error)}") from error
    module.load_state_dict(tensors["model"])


def _tensors(model: DistributedModelParallel, optimizer: KeyedOptimizer) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def _prime(model: DistributedModelParallel, optimizer: KeyedOptimizer) -> None:
    """Let lazy optimizers make their state, so that there is something to load into."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
