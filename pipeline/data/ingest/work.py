"""The folder of unfinished work: what is done is kept, so that a killed ingest goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_DONE = "_done"
_IDENTITY = "identity.json"


class Work:
    """Steps under one folder. A step is a folder that appears whole or not at all.

    Args:
        folder: where to work; made if missing.
        identity: what the work depends on (spec, inputs, versions). Work of another identity is thrown away.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        text = json.dumps(identity, sort_keys=True, indent=1)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        known = folder / _IDENTITY
        if folder.exists() and (not known.is_file() or known.read_text() != text):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        known.write_text(text)

    def path(self, name: str) -> Path:
        """Folder of a step."""
        return self.folder / name

    def done(self, name: str) -> bool:
        """Whether a step is finished."""
        return (self.path(name) / _DONE).is_file()

    @contextmanager
    def step(self, name: str) -> Iterator[Path]:
        """A folder to write into; it becomes the step's when the block ends well."""
        path = self.path(name)
        partial = path.with_name(path.name + ".partial")
        for stale in (partial, path):
            if stale.exists():
                shutil.rmtree(stale)
        partial.mkdir(parents=True)
        yield partial
        (partial / _DONE).touch()
        os.replace(partial, path)

    def drop(self, name: str) -> None:
        """Remove a step whose content is no longer needed, but remember that it was done."""
        path = self.path(name)
        for child in path.iterdir():
            if child.name != _DONE:
                shutil.rmtree(child) if child.is_dir() else child.unlink()

    def remove(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.folder)


def file_identity(paths: list[Path]) -> list[tuple[str, int, int]]:
    """Path, bytes and time of change of files: enough to see that an input is another than before."""
    stats = [(p, p.stat()) for p in paths]
    return [(str(p.resolve()), s.st_size, s.st_mtime_ns) for p, s in stats]
