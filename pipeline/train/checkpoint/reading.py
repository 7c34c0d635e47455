"""Resuming a sharded run, and loading plain tensors into a single-device module."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import KeyedOptimizer

from pipeline.errors import CheckpointError
from pipeline.schema import DatasetSchema
from pipeline.train.build import build_task
from pipeline.train.checkpoint.files import UNSHARDED, first_line, verify
from pipeline.train.checkpoint.shards import Reader
from pipeline.train.checkpoint.state import CheckpointState, read_state
from pipeline.train.model_plan import ModelPlan
from pipeline.train.quiet import quiet_dependencies
from pipeline.train.task import TrainTask

# Settings that a run may change between a checkpoint and going on from it: none of them changes what is learned.
FREE = {"sharding", "checkpoint", "log_steps", "bootstrap_resamples", "compute", "timeout_s"}


class TensorPlanner(DefaultLoadPlanner):
    """DCP's planner, less its reading of objects that are no tensors, which would be unpickled."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise CheckpointError(f"{read_item.dest_index.fqn!r} is no tensor, and checkpoints hold nothing else")


def tensors_of(model: DistributedModelParallel, optimizer: KeyedOptimizer) -> dict[str, Any]:
    """What a checkpoint holds of a run: tensors alone, by name."""
    found = {"model": model.state_dict(), "optimizer": {"state": optimizer.state_dict()["state"]}}
    return found


def resume(
    checkpoint: Path,
    expected: CheckpointState,
    model: DistributedModelParallel,
    optimizer: KeyedOptimizer,
    *,
    growing: bool = False,
) -> CheckpointState:
    """Load weights and optimizer state in place; every rank calls this, whatever number wrote it.

    Args:
        checkpoint: what to load.
        expected: what this run would write now; its model, data and order must be those of the checkpoint.
        model, optimizer: of this run.
        growing: go on with another day's log, whose vocabularies may have grown: rows that the checkpoint lacks
            keep their first values.

    Raises:
        CheckpointError: the checkpoint is of another run, schema or data set, or is damaged.
    """
    state = read_state(checkpoint)
    check_compatible(checkpoint, state, expected, growing=growing)
    _prime(model, optimizer)
    tensors = tensors_of(model, optimizer)
    grown = grown_vocabularies(state.schema, expected.schema) if growing else []
    try:
        if grown:
            load_overlap(checkpoint, flat(tensors))
        else:
            dcp.load(tensors, storage_reader=_checked_reader(checkpoint), planner=TensorPlanner())
    except CheckpointError:
        raise
    except (dcp.CheckpointException, RuntimeError, OSError) as error:
        raise CheckpointError(f"{checkpoint} cannot be read: {_reason(error)}") from error
    model.load_state_dict(tensors["model"])
    whole = optimizer.state_dict()
    optimizer.load_state_dict(whole | tensors["optimizer"])
    optimizer.post_load_state_dict()
    return state


def check_compatible(
    checkpoint: Path, state: CheckpointState, expected: CheckpointState, *, growing: bool = False
) -> None:
    """Check that a run can go on from a checkpoint.

    Raises:
        CheckpointError: the checkpoint is of another run, schema or data set; the message names what differs.
    """
    fields = ["schema", "dataset", "training_days", "moments"]
    if growing:
        # Within a day its rows and their order must be the same; a finished day is past.
        fields = ["moments"] + (["dataset"] if state.training_days == expected.training_days and state.step else [])
        _check_growth(checkpoint, state.schema, expected.schema)
    differ = [name for name in fields if getattr(state, name) != getattr(expected, name)]
    mine, theirs = asdict(expected.config), asdict(state.config)
    differ += [f"config.{k}" for k in mine if k not in FREE and mine[k] != theirs[k]]
    if differ:
        raise CheckpointError(
            f"{checkpoint} cannot be resumed by this run: {', '.join(differ)} differ. "
            "Start a new run (perhaps with --warm-start), or use the recipe, flags and log that the checkpoint was "
            "made with"
        )


def grown_vocabularies(before: DatasetSchema, after: DatasetSchema) -> list[str]:
    """Vocabularies with more ids than before."""
    sizes = {v.name: v.size for v in before.vocabularies}
    return [v.name for v in after.vocabularies if v.size > sizes.get(v.name, v.size)]


def _check_growth(checkpoint: Path, before: DatasetSchema, after: DatasetSchema) -> None:
    """A later day's schema may have more ids in a vocabulary, and nothing else."""
    sizes = {v.name: v for v in before.vocabularies}
    problems = []
    for vocabulary in after.vocabularies:
        old = sizes.get(vocabulary.name, vocabulary)
        if vocabulary.size < old.size:
            problems.append(f"vocabulary {old.name!r} has shrunk from {old.size} to {vocabulary.size} ids")
        if vocabulary.size != old.size and vocabulary.method == "hash":
            problems.append(
                f"vocabulary {old.name!r} is hashed to {vocabulary.size} ids, not {old.size}: ids mean other values"
            )
    same = replace(after, vocabularies=tuple(sizes.get(v.name, v) for v in after.vocabularies))
    if same != before:
        problems.append("the schema differs in more than the sizes of its vocabularies")
    if problems:
        raise CheckpointError(f"{checkpoint} cannot be gone on with: {'; '.join(problems)}")


def load_unsharded(checkpoint: Path, module: nn.Module) -> None:
    """Fill a single-device module, whole or pruned, from a checkpoint or an unsharded file; needs no process group.

    Raises:
        CheckpointError: the checkpoint lacks a parameter of the module, or is damaged.
    """
    quiet_dependencies()
    state = module.state_dict()
    if checkpoint.suffix == UNSHARDED:
        _load_file(checkpoint, state)
    else:
        verify(checkpoint)
        tensors = {"model": state}
        try:
            dcp.load(tensors, storage_reader=_checked_reader(checkpoint), planner=TensorPlanner(), no_dist=True)
        except CheckpointError:
            raise
        except (dcp.CheckpointException, RuntimeError, OSError) as error:
            raise CheckpointError(f"{checkpoint} does not hold this model: {_reason(error)}") from error
    module.load_state_dict(state)


def load_task(checkpoint: Path, plan: ModelPlan | None = None) -> TrainTask:
    """The single-device model of a checkpoint, its weights loaded.

    Args:
        checkpoint: folder, or unsharded file.
        plan: which surfaces to build; None builds the whole model.

    Raises:
        CheckpointError: it is no whole checkpoint.
    """
    task = build_task(plan or read_state(checkpoint).plan, table_device=torch.device("cpu"))
    load_unsharded(checkpoint, task)
    return task


def _load_file(path: Path, state: Mapping[str, Tensor]) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for name, target in state.items():
                if name not in names:
                    raise CheckpointError(f"{path} does not hold this model: it lacks {name}")
                source = file.get_tensor(name)
                if source.shape != target.shape:
                    raise CheckpointError(
                        f"{path} does not hold this model: {name} has shape {list(source.shape)}, "
                        f"not {list(target.shape)}"
                    )
                target.copy_(source)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from error


def flat(tensors: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested states as DCP names them: keys joined by points."""
    found: dict[str, Any] = {}
    for name, value in tensors.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def load_overlap(checkpoint: Path, targets: Mapping[str, Any], sources: Mapping[str, str] | None = None) -> None:
    """Copy what a checkpoint has of each tensor into it, where the two overlap; no collective is used.

    A tensor may have more rows than the checkpoint: those stay as they are.

    Args:
        checkpoint: its folder.
        targets: name to tensor, sharded or whole.
        sources: name in the checkpoint, where it is not the target's.

    Raises:
        CheckpointError: the checkpoint lacks a tensor, or one has fewer rows or other columns.
    """
    reader = Reader(str(checkpoint))
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    parts: dict[tuple[str, tuple[int, ...]], Tensor] = {}
    items: list[ReadItem] = []
    for name, target in targets.items():
        source = (sources or {}).get(name, name)
        entry = saved_tensor(metadata, source, checkpoint)
        size = tuple(target.size())
        if len(size) != len(entry.size) or size[1:] != tuple(entry.size)[1:] or size[:1] < tuple(entry.size)[:1]:
            raise CheckpointError(
                f"{checkpoint} holds {source} with shape {list(entry.size)}, which does not fit into {list(size)}"
            )
        for offsets, tensor in _local_parts(target):
            rows = min(tensor.size(0), entry.size[0] - offsets[0]) if size else 1
            if rows <= 0:
                continue
            view = tensor[:rows] if size else tensor
            chunk = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=view.size())
            parts[source, offsets] = view
            items += create_read_items_for_chunk_list(source, entry, [chunk])
    reader.read_data(LoadPlan(items), _PartPlanner(parts, items))


def saved_tensor(metadata: Metadata, name: str, checkpoint: Path) -> TensorStorageMetadata:
    """The entry of a tensor in an index.

    Raises:
        CheckpointError: there is none.
    """
    entry = metadata.state_dict_metadata.get(name)
    if not isinstance(entry, TensorStorageMetadata):
        raise CheckpointError(f"{checkpoint} lacks the tensor {name}")
    return entry


def _local_parts(value: Any) -> list[tuple[tuple[int, ...], Tensor]]:
    """Offsets and tensors of what this rank holds."""
    if isinstance(value, ShardedTensor):
        return [(tuple(s.metadata.shard_offsets), s.tensor.detach()) for s in value.local_shards()]
    return [((0,) * value.dim(), value.detach())]


class _PartPlanner(DefaultLoadPlanner):
    """Gives the reader the tensors that the read items of `load_overlap` fill."""

    def __init__(self, parts: Mapping[tuple[str, tuple[int, ...]], Tensor], items: list[ReadItem]) -> None:
        super().__init__()
        self.parts = parts
        self.items = items

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.parts[index.fqn, tuple(index.offset or ())]


def _checked_reader(checkpoint: Path) -> Reader:
    """A reader whose index has been read once: DCP would bury what is wrong with it under its own words."""
    reader = Reader(str(checkpoint))
    reader.read_metadata()
    return reader


def _prime(model: DistributedModelParallel, optimizer: KeyedOptimizer) -> None:
    """Let lazy optimizers make their state, so that there is something to load into."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def _reason(error: BaseException) -> str:
    """What DCP's error of several ranks comes down to."""
    if isinstance(error, dcp.CheckpointException):
        for failure in error.failures.values():
            return first_line(failure[0])
    return first_line(error)
