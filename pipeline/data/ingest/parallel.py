"""Buckets handled by several processes of this machine.

A bucket's step reads what earlier steps wrote and writes a folder of its own, so processes share nothing but
the folder of unfinished work, and which of them does a bucket changes no byte of it.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Self

from pipeline.errors import DataError

_THREADS = "POLARS_MAX_THREADS"


@dataclass(frozen=True)
class Step:
    """One step of the work.

    Args:
        name: of its folder.
        what: for people.
        arguments: of the function that writes it, before the folder.
    """

    name: str
    what: str
    arguments: tuple[Any, ...]


class Processes:
    """Processes that do steps; they start when there is the first thing to do, and end with the block.

    Args:
        jobs: how many.
    """

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self._pool: ProcessPoolExecutor | None = None
        self._shares = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._shares.close()

    def run(self, do: Callable[[Step], None], steps: Sequence[Step], progress: Callable[[str], None]) -> None:
        """Do steps that do not depend on each other.

        Args:
            do: does one; picklable. It travels with every step, for a few steps at a time.
            progress: told what is done, in the steps' order.

        Raises:
            DataError: a process was killed, or a step raised it; of several, the first step's.
        """
        if self._pool is None:
            self._shares.enter_context(_threads(self.jobs))
            self._pool = ProcessPoolExecutor(self.jobs, multiprocessing.get_context("spawn"))
        running = [self._pool.submit(do, step) for step in steps]
        try:
            for step, future in zip(steps, running, strict=True):
                future.result()
                progress(step.what)
        except BrokenProcessPool as error:
            raise DataError(
                "a process of the ingest was killed, most likely for want of memory; give fewer jobs or a smaller "
                "memory_gb, and run the same command again: what is done is kept"
            ) from error
        finally:
            for future in running:
                future.cancel()


@contextmanager
def _threads(jobs: int) -> Iterator[None]:
    """Processes that start inside share the cores: each one's Polars gets a part of them."""
    before = os.environ.get(_THREADS)
    if before is None:
        os.environ[_THREADS] = str(max(1, (os.cpu_count() or 1) // jobs))
    try:
        yield
    finally:
        if before is None:
            del os.environ[_THREADS]
