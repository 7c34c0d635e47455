"""The folder of unfinished work: what is done is kept, so that a killed ingest goes on where it stopped.

Several workers, on one machine or on many that see the same folder, may work in it at once: each takes steps that
nobody is at, and one brings them together. Who is at what is told by locks (flock), which the kernel lets go of when
a worker dies, so that another takes over what it was at.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pipeline.errors import DataError

_DONE = "_done"
_IDENTITY = "identity.json"
_LOCKS = "locks"
_AT_WORK, _FINISHING = ".ingest.lock", ".finish.lock"
POLL_S = 0.2
# The first worker writes down what the work depends on in far less.
SETTING_UP_S = 30.0


class Work:
    """Steps under one folder. A step is a folder that appears whole or not at all.

    Args:
        folder: where to work; made if missing.
        identity: what the work depends on (spec, inputs, versions). Work of another identity is thrown away.
        alone: whether nobody else is at work here; others' work of another identity is an error.

    Raises:
        DataError: others are at work here on something else.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], *, alone: bool = True) -> None:
        self.folder = folder
        self._identity = json.dumps(identity, sort_keys=True, indent=1)
        self.fingerprint = hashlib.sha256(self._identity.encode()).hexdigest()[:16]
        if not alone:
            self.check()
            return
        if folder.exists() and not self._agrees():
            shutil.rmtree(folder)
        (folder / _LOCKS).mkdir(parents=True, exist_ok=True)
        (folder / _IDENTITY).write_text(self._identity)

    def _agrees(self) -> bool:
        known = self.folder / _IDENTITY
        return known.is_file() and known.read_text() == self._identity

    def check(self) -> None:
        """See that what is worked on here is this work.

        Raises:
            DataError: it is another's.
        """
        if not self._agrees():
            raise DataError(
                "workers with another spec, other inputs or other flags are at work here; start all workers with the "
                "same command, or wait for those to end",
                file=str(self.folder),
            )

    def path(self, name: str) -> Path:
        """Folder of a step."""
        return self.folder / name

    def done(self, name: str) -> bool:
        """Whether a step is finished."""
        return (self.path(name) / _DONE).is_file()

    @contextmanager
    def claimed(self, name: str) -> Iterator[bool]:
        """Whether a step is this worker's to do: neither done, nor is another worker at it while the block lasts."""
        with (self.folder / _LOCKS / name).open("w") as file:
            yield _lock(file, fcntl.LOCK_EX) and not self.done(name)

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

    def remove(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.folder)


class Presence:
    """This worker among those at work on one log; made by `at_work`.

    Attributes:
        alone: whether nobody else was there when it came.
    """

    def __init__(self, out: Path, file: IO[str], *, alone: bool) -> None:
        self._out, self._file, self.alone = out, file, alone

    def let_others_in(self) -> None:
        """What the work depends on is written down: others may join."""
        fcntl.flock(self._file, fcntl.LOCK_SH)

    @contextmanager
    def last_part(self, done: Callable[[], bool]) -> Iterator[bool]:
        """Whether the part that one worker does is this one's; False once another has done it.

        Args:
            done: whether it is done.
        """
        with (self._out / _FINISHING).open("w") as file:
            while not (mine := _lock(file, fcntl.LOCK_EX)) and not done():
                time.sleep(POLL_S)
            yield mine and not done()

    def wait_until_alone(self) -> None:
        """Until all others have seen that the log is done and have left."""
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def remove_locks(self) -> None:
        """Remove the files of the locks; who still waits for one finds the log once it has it."""
        for name in (_AT_WORK, _FINISHING):
            (self._out / name).unlink(missing_ok=True)


@contextmanager
def at_work(out: Path, *, shared: bool) -> Iterator[Presence]:
    """Hold the folder of a log to be, alone or with others that share the work.

    Raises:
        DataError: another ingest is at work there, and this one does not share, or that one does not.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / _AT_WORK).open("w") as file:
        end = time.monotonic() + SETTING_UP_S
        # Whoever comes first holds the folder alone until it has written down what the work depends on.
        while not (alone := _lock(file, fcntl.LOCK_EX)) and not (shared and _lock(file, fcntl.LOCK_SH)):
            if not shared or time.monotonic() > end:
                raise DataError(
                    "another ingest is at work in the folder; wait for it, or start all with the same --workers, 2 or "
                    "more, to share the work",
                    file=str(out),
                )
            time.sleep(POLL_S)
        yield Presence(out, file, alone=alone)


def _lock(file: IO[str], how: int) -> bool:
    """Whether the lock was to be had at once."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def file_identity(paths: list[Path]) -> list[tuple[str, int, int]]:
    """Path, bytes and time of change of files: enough to see that an input is another than before."""
    stats = [(p, p.stat()) for p in paths]
    return [(str(p.resolve()), s.st_size, s.st_mtime_ns) for p, s in stats]
