"""The journal of one run: everything that is to reach MLflow, on disk before anything is sent.

A folder holds `journal.jsonl`, one entry a line and only ever appended to; `files/`, the artifacts that wait;
`sent.json`, how many bytes of the journal have arrived; and `rejected.jsonl`, entries that MLflow will not take.
An entry is a JSON object with `kind` and `ms` (when it happened, milliseconds since the epoch, UTC).
Lines survive the death of the process; they are not forced to the disk at each write.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config

from pipeline.errors import DataError

JOURNAL, FILES, STATE, REJECTED, LOCK = "journal.jsonl", "files", "sent.json", "rejected.jsonl", ".lock"
Entry = dict[str, Any]


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, kw_only=True)
class State:
    """How far a journal has been sent.

    Args:
        offset: bytes of the journal that MLflow has.
        run_id: MLflow's id of the run, once it has one.
        linked: whether the run knows its parent, or has none.
    """

    offset: Annotated[int, Field(ge=0)] = 0
    run_id: str | None = None
    linked: bool = True


_STATE = TypeAdapter(State)


class Journal:
    """The writing end; one process and run at a time, any thread.

    Args:
        folder: made if need be. A journal that is there already is continued; half a line at its end, left by
            a process that died while writing, is cut off.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / FILES).mkdir(parents=True, exist_ok=True)
        path = folder / JOURNAL
        if path.exists():
            _cut_half_line(path)
        self._file = path.open("ab", buffering=0)  # one entry, one write
        self._lock = threading.Lock()
        self._staged = 0

    @property
    def size(self) -> int:
        """Bytes written."""
        return (self.folder / JOURNAL).stat().st_size

    def append(self, kind: str, **fields: Any) -> None:
        """Write one entry, whole or not at all.

        Raises:
            OSError: the disk is full or gone.
        """
        line = json.dumps({"kind": kind, "ms": time.time_ns() // 1_000_000} | fields) + "\n"
        with self._lock:
            before, left = self._file.seek(0, os.SEEK_END), memoryview(line.encode())
            try:
                while left:
                    # A disk that fills up takes a part and says nothing; the next call says it.
                    left = left[self._file.write(left) or 0 :]
            except OSError:
                # Half a line would join with the next entry, and hide all that follow.
                self._file.truncate(before)
                raise

    def place(self, name: str) -> Path:
        """A path in a folder of its own under `files/`, for an artifact of that name to wait in."""
        with self._lock:
            self._staged += 1
            folder = self.folder / FILES / f"{time.time_ns()}-{self._staged}"
        folder.mkdir()
        return folder / name

    def stage(self, path: Path) -> str:
        """Take a file or folder as it is now, by hard link where the disk allows; returns its place in `folder`."""
        target = self.place(path.name)
        if path.is_dir():
            shutil.copytree(path, target, copy_function=_link)
        else:
            _link(str(path), str(target))
        return str(target.relative_to(self.folder))

    def close(self) -> None:
        """No more entries."""
        self._file.close()


def entries(folder: Path, offset: int = 0) -> Iterator[tuple[Entry, int]]:
    """Whole entries from byte `offset` on, each with the offset of the next.

    Raises:
        DataError: there is no journal, or a line of it is no JSON object.
    """
    path = folder / JOURNAL
    if not path.is_file():
        raise DataError("no run was journalled here; give the folder that holds journal.jsonl", file=str(path))
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                entry = json.loads(line)
                if not isinstance(entry["kind"], str) or not isinstance(entry["ms"], int):
                    raise TypeError("kind is text, ms a whole number")
            except (ValueError, KeyError, TypeError, RecursionError) as cause:
                raise DataError(f"the line that ends at byte {offset} is no entry", file=str(path)) from cause
            yield entry, offset


def read_state(folder: Path) -> State:
    """How far the journal in `folder` has been sent.

    Raises:
        DataError: the file is damaged.
    """
    path = folder / STATE
    if not path.exists():
        return State()
    try:
        return _STATE.validate_json(path.read_bytes(), strict=True)
    except ValidationError as error:
        raise DataError(
            "the file is damaged; remove it, and all records are sent once more, which changes nothing", file=str(path)
        ) from error


def write_state(folder: Path, state: State) -> None:
    """Remember how far the journal has been sent; a reader sees the old state or the new."""
    beside = folder / f".{STATE}.{os.getpid()}"
    beside.write_text(json.dumps(asdict(state)))
    beside.replace(folder / STATE)


def reject(folder: Path, entry: Entry, why: str) -> None:
    """Set aside an entry that MLflow will never take, so that it does not hold up those behind it."""
    with (folder / REJECTED).open("a") as file:
        file.write(json.dumps({"why": why, "entry": entry}) + "\n")


def _link(source: str, target: str) -> None:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)


def _cut_half_line(path: Path) -> None:
    with path.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
