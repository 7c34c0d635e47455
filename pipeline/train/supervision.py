"""When a run is told to leave, and when a rank has stopped.

SIGTERM (a scheduler that takes the machine back) only sets a flag; ranks tell each other of it in the exchange that
every step makes anyway, so that all leave after the same step. A rank that finishes no step in time writes the
stacks of all its threads and ends; `faulthandler` does this from a thread of its own that needs no interpreter lock.
When its launcher is killed the kernel tells a rank, as nobody else would: to leave if all ranks have that launcher; to
end at once if there are other nodes, whose launchers then see a lost rank and start again, without this
node if need be.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any


class Supervision:
    """A context in which SIGTERM asks the run to leave and `beat` must be called at least every `timeout_s`.

    Args:
        stacks: file for the stacks of a rank that stopped; it is there after the context only if it was needed.
        timeout_s: time without a beat after which the process writes its stacks and ends with status 1; counts from
            the first beat.
    """

    def __init__(self, stacks: Path | None = None, timeout_s: float = 1800.0) -> None:
        self.stacks = stacks
        self.timeout_s = timeout_s
        self.leaving = False
        self._file: Any = None
        self._before: Any = None

    def __enter__(self) -> Supervision:
        if self.stacks is not None:
            self.stacks.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.stacks.open("w")
        # Only the main thread may set handlers; a run inside another thread is told to leave by its owner.
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._leave)
            if "RANK" in os.environ:
                leave_with_parent(signal.SIGTERM if _one_launcher() else signal.SIGKILL)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
        if self._file is not None:
            assert self.stacks is not None, "the file was opened there"
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            if self.stacks.exists() and not self.stacks.stat().st_size:
                self.stacks.unlink()

    def beat(self) -> None:
        """Say that this rank goes on."""
        if self._file is not None:
            faulthandler.dump_traceback_later(self.timeout_s, exit=True, file=self._file)

    def rest(self) -> None:
        """Say that what follows has no steps."""
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The block counts as one step. For what makes groups of ranks: who makes one waits for its peers in a store,
        and if the rank that keeps the store has stopped, the wait outlasts its own time-out."""
        self.beat()
        yield
        self.rest()

    def _leave(self, number: int, frame: FrameType | None) -> None:
        self.leaving = True


def _one_launcher() -> bool:
    """Whether the launcher of this rank, by the environment, is the launcher of all."""
    ranks = os.environ.get("WORLD_SIZE", "1")
    return os.environ.get("LOCAL_WORLD_SIZE", ranks) == ranks


def leave_with_parent(number: int = signal.SIGTERM) -> None:
    """Have the kernel send this process a signal when its parent dies; does nothing where the system is not Linux."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, number)


def stacks_file(folder: Path, rank: int) -> Path:
    """Where a rank of a run writes its stacks; every start of the run has files of its own."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return folder / "stacks" / f"rank-{rank}-restart-{attempt}-process-{os.getpid()}.txt"
