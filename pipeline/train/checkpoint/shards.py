"""Tensors of a checkpoint in DCP's storage: a safetensors file a rank, and an index that is read without running code.

DCP's own files hold a pickle for each tensor. Hundreds of small ones take Python's lock from training for longer than
the tensors take to reach the disk; here a file is a header and bytes. Any reader of the format opens one:
https://github.com/huggingface/safetensors#format. The index `.metadata` is a pickle, which can run anything; it is read
by an unpickler that knows the classes of an index and nothing else.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from pipeline.errors import CheckpointError
from pipeline.train.checkpoint.files import INDEX, UNSHARDED, HashedFiles

# Most bytes of a table in memory at once while it is read.
_BLOCK = 1 << 26
# Names of types in a safetensors file.
_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

Entries = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Name of a tensor to its type and shape."""


def layout(entries: Entries) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The start of a safetensors file and where in the file each tensor lies, from its first byte to past its last.

    Eight bytes of header length, the header as JSON, tensors; in the order of `entries` within a width of type.

    Raises:
        CheckpointError: a type that such a file cannot hold.
    """
    header: dict[str, object] = {}
    spans: dict[str, tuple[int, int]] = {}
    offset = 0
    # Wide types first, so that every tensor is aligned.
    for name, (dtype, shape) in sorted(entries.items(), key=lambda e: -e[1][0].itemsize):
        if dtype not in _TYPES:
            raise CheckpointError(f"{name} has type {dtype}, which a {UNSHARDED} file cannot hold")
        size = dtype.itemsize * math.prod(shape)
        spans[name] = (offset, offset + size)
        header[name] = {"dtype": _TYPES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: (start + a, start + b) for name, (a, b) in spans.items()}


class Writer(dcp.FileSystemWriter):
    """DCP's writer of files, of one safetensors file a rank; keeps digests and no path of the machine that wrote.

    Args:
        path: folder to write.
        files: opens and hashes them.
    """

    def __init__(self, path: str, files: HashedFiles) -> None:
        super().__init__(path)
        self.fs = files

    def storage_meta(self) -> None:
        """Nothing: where a checkpoint was written is not what it is."""
        return None

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data=f"rank-{rank}{UNSHARDED}") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's tensors, wide types first; a part of a table is named `TABLE[first row, first column]`."""
        file: str = plan.storage_data
        tensors = {_part_name(item): (item, _tensor(planner.resolve_data(item))) for item in plan.items}
        header, spans = layout({name: (t.dtype, tuple(t.shape)) for name, (_, t) in tensors.items()})
        results = []
        with self.fs.create_stream(self.fs.concat_path(self.path, file), "wb") as stream:
            stream.write(header)
            for name, (start, stop) in spans.items():
                item, tensor = tensors[name]
                stream.write(_bytes(tensor))
                where = _StorageInfo(relative_path=file, offset=start, length=stop - start)
                results.append(WriteResult(index=item.index, size_in_bytes=stop - start, storage_data=where))
            stream.flush()
            os.fsync(stream.fileno())
        written: Future[list[WriteResult]] = Future()
        written.set_result(results)
        return written


def _part_name(item: WriteItem) -> str:
    name, data = item.index.fqn, item.tensor_data
    if data is None or data.chunk.sizes == data.size:
        return name
    return f"{name}[{', '.join(map(str, data.chunk.offsets))}]"


def _tensor(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise CheckpointError(f"{type(value).__name__} is no tensor, and checkpoints hold nothing else")
    return value.detach()


def _bytes(tensor: Tensor) -> memoryview:
    # numpy's arrays are buffers, which its annotations do not say before Python 3.12.
    array: Any = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


class Reader(dcp.FileSystemReader):
    """DCP's reader of such files, whose index cannot run code or name files outside the checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index.

        Raises:
            CheckpointError: it is damaged, or holds what no index holds.
        """
        path = Path(self.path) / INDEX
        try:
            with path.open("rb") as file:
                metadata = _IndexUnpickler(file).load()
        except Exception as error:  # a damaged pickle can raise anything
            raise CheckpointError(f"{path} is no index of tensors: {error}; use another checkpoint") from error
        try:
            for problem in _problems(metadata):
                raise CheckpointError(f"{path}{problem}; use another checkpoint")
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # objects without their fields, or of others
            raise CheckpointError(f"{path} is no index of tensors: {error}; use another checkpoint") from error
        return metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)
        self.index = metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the planner's tensors.

        Raises:
            CheckpointError: the index and the files do not agree.
        """
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for name, items in by_file.items():
            path = Path(self.path) / name
            if not path.is_file():
                raise CheckpointError(f"{self.path} is damaged: {name} is missing; use another checkpoint")
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                for item in items:
                    dtype, shape = self._stored(item.storage_index)
                    where = self.storage_data[item.storage_index]
                    if (
                        where.length != dtype.itemsize * math.prod(shape)
                        or not 0 <= where.offset <= size - where.length
                    ):
                        raise CheckpointError(
                            f"{path} is damaged: it does not hold {item.storage_index.fqn} where {INDEX} says; "
                            "use another checkpoint"
                        )
                    target = planner.resolve_tensor(item).detach()
                    _fill(target, file, where.offset, dtype, shape, item)
                    planner.commit_tensor(item, target)
        read: Future[None] = Future()
        read.set_result(None)
        return read

    def _stored(self, index: MetadataIndex) -> tuple[torch.dtype, tuple[int, ...]]:
        """Type and shape of a stored part of a tensor."""
        entry = self.index.state_dict_metadata[index.fqn]
        assert isinstance(entry, TensorStorageMetadata), "read_metadata lets nothing else through"
        chunk = next(c for c in entry.chunks if index.offset is None or c.offsets == index.offset)
        return entry.properties.dtype, tuple(chunk.sizes)


def _fill(
    target: Tensor, file: io.BufferedReader, start: int, dtype: torch.dtype, shape: tuple[int, ...], item: ReadItem
) -> None:
    """Copy a part of a stored tensor, rows after rows."""
    offsets, lengths = tuple(item.storage_offsets), tuple(item.lengths)
    if not shape:
        target, shape, offsets, lengths = target.view(1), (1,), (0,), (1,)
    row = dtype.itemsize * math.prod(shape[1:])
    step = max(_BLOCK // max(row, 1), 1)
    for first in range(0, lengths[0], step):
        rows = min(step, lengths[0] - first)
        buffer = torch.empty(rows * row, dtype=torch.uint8)
        file.seek(start + (offsets[0] + first) * row)
        if file.readinto(_bytes(buffer)) != rows * row:
            raise CheckpointError(f"{file.name} is damaged: it ends too early; use another checkpoint")
        stored = buffer.view(dtype).view(rows, *shape[1:])
        for axis in range(1, len(shape)):
            stored = stored.narrow(axis, offsets[axis], lengths[axis])
        target[first : first + rows].copy_(stored)


def _problems(index: Any) -> Iterator[str]:
    """What is wrong with what an index says; what is of another kind altogether raises."""
    if not isinstance(index, Metadata) or not isinstance(index.storage_data, dict):
        yield " is no index of tensors"
    for place in index.storage_data.values():
        if Path(place.relative_path).name != place.relative_path:
            yield f" names {place.relative_path!r}, which lies outside the checkpoint"
        if not (type(place.offset) is type(place.length) is int):
            yield f" says where in {place.relative_path} a tensor lies, but not by a number"
    for name, entry in index.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            yield f": {name!r} is no tensor, and checkpoints hold nothing else"
        if not isinstance(entry.properties.dtype, torch.dtype) or not isinstance(entry.size, torch.Size):
            yield f": {name!r} has no type or no shape"
        for part in entry.chunks:
            ends = [a + b for a, b in zip(part.offsets, part.sizes, strict=True)]
            if min((0, *part.offsets, *part.sizes)) < 0 or any(a > b for a, b in zip(ends, entry.size, strict=True)):
                yield f": a part of {name!r} lies outside it"
            if MetadataIndex(name, part.offsets) not in index.storage_data:
                yield f" does not say where a part of {name!r} lies"


# What an index is made of; everything else in a pickle is refused before it is so much as imported.
_CHECKPOINT = "torch.distributed.checkpoint"
_ALLOWED = {
    f"{_CHECKPOINT}.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    f"{_CHECKPOINT}.filesystem": {"_StorageInfo"},
    "torch": {"Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"},
    "torch.serialization": {"_get_layout"},
}


class _IndexUnpickler(pickle._Unpickler):
    """Python's own unpickler, not C's: a forged one of a few bytes makes C's ask for gigabytes."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no index holds")
        return super().find_class(module, name)
