"""One file of plain tensors from a checkpoint of any number of ranks."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.train.checkpoint.files import INDEX, UNSHARDED, sync_folder, verify, write_durably
from pipeline.train.checkpoint.reading import load_overlap, saved_tensor
from pipeline.train.checkpoint.shards import Reader, layout
from pipeline.train.checkpoint.state import read_state, state_to_json

_MODEL = "model."


def unshard(checkpoint: Path, out: Path) -> Path:
    """Write a checkpoint's weights to `out`, a .safetensors file, and what they are to the .json beside it.

    Tables go through a memory map of the file, so that memory does not bound their size. Optimizer state is left out.

    Args:
        checkpoint: folder of a checkpoint.
        out: path that ends in .safetensors; must not exist.

    Raises:
        CheckpointError: the checkpoint is damaged, or `out` cannot be written.
    """
    state = read_state(checkpoint)
    if out.suffix != UNSHARDED:
        raise CheckpointError(f"{out} does not end in {UNSHARDED}; name the file so")
    if checkpoint.suffix == UNSHARDED or not (checkpoint / INDEX).is_file():
        raise CheckpointError(f"{checkpoint} is unsharded already")
    if out.exists() or out.with_suffix(".json").exists():
        raise CheckpointError(f"{out} or its .json already exists; choose another name, or remove them first")
    verify(checkpoint)
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.writing")
    try:
        targets = _map_file(beside, _entries(checkpoint))
        load_overlap(checkpoint, targets)
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        write_durably(out.with_suffix(".json"), state_to_json(state))
        os.replace(beside, out)
        sync_folder(out.parent)
    except OSError as error:
        raise CheckpointError(f"{out} could not be written: {error}; free space or choose another place") from error
    finally:
        beside.unlink(missing_ok=True)
    return out


def _entries(checkpoint: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of every tensor of the model, by its name in the checkpoint."""
    metadata = Reader(str(checkpoint)).read_metadata()
    found = {}
    for name in sorted(metadata.state_dict_metadata):
        if name.startswith(_MODEL):
            entry = saved_tensor(metadata, name, checkpoint)
            found[name] = (entry.properties.dtype, tuple(entry.size))
    return found


def _map_file(path: Path, entries: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, Tensor]:
    """Lay out a safetensors file; returns views of it, by name in the checkpoint."""
    header, spans = layout({name.removeprefix(_MODEL): entry for name, entry in entries.items()})
    end = max((stop for _, stop in spans.values()), default=len(header))
    with path.open("wb") as file:
        file.write(header)
        # Reserve the space now: a full disk must be an error here, not a bus error at the first touch of a page.
        if end > len(header):
            os.posix_fallocate(file.fileno(), len(header), end - len(header))
    data = torch.from_file(str(path), shared=True, size=end, dtype=torch.uint8)
    found = {}
    for name, (dtype, shape) in entries.items():
        start, stop = spans[name.removeprefix(_MODEL)]
        found[name] = data[start:stop].view(dtype).view(shape)
    return found
