"""Fresh weights for an artifact that is already served: the rows of tables that changed, and all dense weights.

    delta.json           what it starts from, what it gives, how large it is
    delta.safetensors    per matrix of tables: `NAME.places` (int32 [n], int64 past 2^31 rows) and `NAME.rows`;
                         dense weights by name
    parity.json          how far the scores after it are from the trainer's
    manifest.json        size and SHA-256 of each of the above

States of weights are named by a digest of every value (`weights_digest`), so a delta fits one state and no other,
wherever that state came from: an artifact, or an artifact and earlier deltas.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from torch import Tensor

from pipeline.errors import ArtifactError
from pipeline.serve.artifact import check_folder, write_manifest
from pipeline.serve.tables import TableDtype, is_table

DELTA, TENSORS = "delta.json", "delta.safetensors"
_PLACES, _ROWS = ".places", ".rows"


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, kw_only=True)
class Delta:
    """Content of `delta.json`.

    Args:
        format_version: of this layout.
        surface: of the artifact.
        dtype: of its table values.
        base: digest of the weights that it is applied to.
        result: digest of the weights that come out.
        changed_rows: of each matrix of tables, with its number of rows.
        bytes: of the tensors of the delta.
        full_bytes: of all tensors of the artifact.
    """

    format_version: Literal[1]
    surface: str
    dtype: TableDtype
    base: str
    result: str
    changed_rows: dict[str, tuple[int, int]]
    bytes: int
    full_bytes: int


_DELTA = TypeAdapter(Delta)


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values of all tensors, in order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_delta(
    folder: Path, *, surface: str, dtype: TableDtype, base: Mapping[str, Tensor], new: Mapping[str, Tensor]
) -> Delta:
    """Write the tensors and description of what leads from one state of weights to another, without a manifest.

    Args:
        folder: where to; must exist.
        surface: of the artifact.
        dtype: of its table values.
        base: every tensor of the program before.
        new: the tensors that may have changed; others stay.

    Raises:
        ArtifactError: a tensor has another shape or type than before.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    changed: dict[str, tuple[int, int]] = {}
    for name, after in new.items():
        before = base.get(name)
        if before is None or before.shape != after.shape or before.dtype != after.dtype:
            raise ArtifactError(
                f"{name} was {_form(before)} and is {_form(after)}: tables or layers have changed size, which a delta "
                "cannot say; export a whole artifact"
            )
        if is_table(name):
            places = (before != after).any(1).nonzero().squeeze(1)
            changed[name] = (int(places.numel()), int(after.shape[0]))
            narrow = places.int() if after.shape[0] < 2**31 else places
            tensors |= {name + _PLACES: narrow, name + _ROWS: after[places].contiguous()}
        else:
            tensors[name] = after.detach().clone().contiguous()
    save_file(tensors, folder / TENSORS)
    delta = Delta(
        format_version=1,
        surface=surface,
        dtype=dtype,
        base=weights_digest(base),
        result=weights_digest({**base, **new}),
        changed_rows=changed,
        bytes=sum(t.nbytes for t in tensors.values()),
        full_bytes=sum(t.nbytes for t in base.values()),
    )
    (folder / DELTA).write_bytes(_DELTA.dump_json(delta, indent=1))
    return delta


@contextmanager
def writing(out: Path, versions: dict[str, str]) -> Iterator[Path]:
    """A folder to write to, which gets its manifest and its name `out` at the end, and vanishes if anything fails."""
    beside = out.parent / f".{out.name}.writing"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        write_manifest(beside, versions)
        os.replace(beside, out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def read_delta(path: Path) -> Delta:
    """What a delta is; every file is checked against its manifest.

    Raises:
        ArtifactError: there is no delta, it is of another version, or a file is missing or changed.
    """
    check_folder(path, (DELTA, TENSORS), what="delta")
    try:
        return _DELTA.validate_json((path / DELTA).read_bytes())
    except ValidationError as error:
        lines = [f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors()[:5]]
        raise ArtifactError(f"{path / DELTA} is not a delta of this version: " + "; ".join(lines)) from error


def changed_tensors(path: Path, delta: Delta, current: Mapping[str, Tensor], state: str) -> dict[str, Tensor]:
    """The tensors that a checked delta gives new values, whole; what is given stays as it is.

    Args:
        path: folder of the delta.
        delta: from `read_delta`.
        current: every tensor of the program now.
        state: digest of these.

    Raises:
        ArtifactError: the delta starts from other weights, or does not end in those that it promises.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if delta.base != state:
        raise ArtifactError(
            f"{path} starts from weights {delta.base[:12]}, these are {state[:12]}; apply the deltas in order, "
            "or open the artifact that it was made from"
        )
    changed: dict[str, Tensor] = {}
    try:
        tensors = load_file(path / TENSORS)
        for name in delta.changed_rows:
            matrix = current[name].detach().cpu().clone()
            matrix[tensors.pop(name + _PLACES).long()] = tensors.pop(name + _ROWS)
            changed[name] = matrix
    except (SafetensorError, KeyError, IndexError, RuntimeError, OSError) as error:
        raise ArtifactError(f"{path / TENSORS} is not what {DELTA} says ({error}); it is not applied") from error
    changed |= tensors
    found = weights_digest({**current, **changed})
    if found != delta.result:
        raise ArtifactError(f"{path} promises weights {delta.result[:12]} and gives {found[:12]}; it is not applied")
    return changed


def _form(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
