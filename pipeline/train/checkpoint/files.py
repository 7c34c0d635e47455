"""Files of a checkpoint: checksums and durable writing.

A file is hashed as it is written, synced, dropped from the page cache and read back: what the manifest says is
what the disk gave back.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from torch.distributed.checkpoint.filesystem import FileSystem

from pipeline.errors import CheckpointError
from pipeline.texts import is_file, parse_json

INDEX = ".metadata"
MANIFEST = "manifest.json"
# Suffix of a file of plain tensors, in place of a folder.
UNSHARDED = ".safetensors"
MANIFEST_VERSION = 1
_BLOCK = 1 << 22

Digests = dict[str, tuple[int, str]]
"""File name to size in bytes and SHA-256."""


class HashedFiles(FileSystem):
    """DCP's file system that keeps the digest of each file it writes.

    Attributes:
        digests: of the files closed so far.
        error: the first failure of the operating system; DCP hides it in its own.
    """

    def __init__(self) -> None:
        self.digests: Digests = {}
        self.error: OSError | None = None

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        try:
            with Path(path).open(mode) as file:
                stream: Any = _Hashed(file) if "w" in mode else file
                yield stream
        except OSError as error:
            self.error = self.error or error
            raise
        if "w" in mode:
            self.digests[Path(path).name] = (stream.written, stream.hash.hexdigest())

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.digests[Path(new_path).name] = self.digests.pop(Path(path).name)


class _Hashed:
    """A file open for writing from start to end, hashed on the way."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.hash = hashlib.sha256()
        self.written = 0

    def write(self, data: Any) -> int:
        self.hash.update(data)
        count = self.file.write(data)
        self.written += count
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def digest(path: Path, *, from_disk: bool = False) -> tuple[int, str]:
    """Size and SHA-256 of a file; `from_disk` asks the system to forget its cached copy first."""
    found = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        size = 0
        while block := file.read(_BLOCK):
            found.update(block)
            size += len(block)
    return size, found.hexdigest()


def write_durably(path: Path, data: bytes) -> tuple[int, str]:
    """Write a whole file that is there, or not, after a crash; returns its size and SHA-256."""
    beside = path.with_name(f".{path.name}.writing")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    sync_folder(path.parent)
    return len(data), hashlib.sha256(data).hexdigest()


def first_line(error: BaseException) -> str:
    """The first line that says something of an error."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check(folder: Path, digests: Digests, *, from_disk: bool = False) -> None:
    """Read files back.

    Raises:
        CheckpointError: one is missing or not what its digest says.
    """
    for name, (size, sha) in sorted(digests.items()):
        path = folder / name
        if not is_file(path):
            raise CheckpointError(f"{folder} is damaged: {name} is missing; use another checkpoint")
        found = digest(path, from_disk=from_disk)
        if found != (size, sha):
            what = f"has {found[0]} bytes in place of {size}" if found[0] != size else "has another checksum"
            raise CheckpointError(f"{folder} is damaged: {name} {what}; use another checkpoint")


def write_manifest(folder: Path, digests: Digests) -> None:
    """Seal a checkpoint."""
    text = json.dumps({"format_version": MANIFEST_VERSION, "files": dict(sorted(digests.items()))}, indent=1)
    write_durably(folder / MANIFEST, text.encode())


def read_manifest(folder: Path) -> Digests:
    """The digests of a checkpoint's files.

    Raises:
        CheckpointError: there is no manifest, or not of this version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder} is damaged: {MANIFEST} is missing; use another checkpoint")
    try:
        manifest = parse_json(path.read_bytes())
        if manifest["format_version"] != MANIFEST_VERSION:
            raise CheckpointError(f"{path} is of version {manifest['format_version']}, not {MANIFEST_VERSION}")
        files = {str(name): (int(size), str(sha)) for name, (size, sha) in manifest["files"].items()}
    except (ValueError, OverflowError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); use another checkpoint") from error
    if wrong := [name for name in files if Path(name).name != name]:
        raise CheckpointError(f"{path} names {wrong[0]!r}, which lies outside the checkpoint")
    return files


def verify(checkpoint: Path, *, part: int = 0, parts: int = 1) -> None:
    """Check that every file of a checkpoint is there and what was written.

    Args:
        checkpoint: its folder.
        part, parts: check every `parts`-th file from `part` on, so that ranks can share the work.

    Raises:
        CheckpointError: it is damaged.
    """
    digests = read_manifest(checkpoint)
    check(checkpoint, {n: d for i, (n, d) in enumerate(sorted(digests.items())) if i % parts == part})
