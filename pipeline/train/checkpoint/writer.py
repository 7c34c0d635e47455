"""Saving while training goes on.

Training waits only while tensors are copied to host memory (pinned, where there is CUDA; the same buffers each
time). A thread then writes, over a process group of its own, so that its collectives never meet those of a step.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import KeyedOptimizer

from pipeline.config import CheckpointConfig
from pipeline.errors import CheckpointError
from pipeline.train.checkpoint.files import (
    HashedFiles,
    check,
    first_line,
    sync_folder,
    write_durably,
    write_manifest,
)
from pipeline.train.checkpoint.reading import tensors_of
from pipeline.train.checkpoint.shards import Writer
from pipeline.train.checkpoint.shelf import Shelf, newest
from pipeline.train.checkpoint.state import STATE, CheckpointState, record_metrics, state_to_json
from pipeline.train.sharding import Ranks

Result = TypeVar("Result")
_BEAT_S = 5.0


class CheckpointWriter:
    """Writes checkpoints of a sharded model, one at a time; every rank has one and calls it at the same steps.

    Args:
        folder: RUN/checkpoints.
        config: how many are kept, and whether training waits for the writing.
        ranks: this process among its peers.
        beat: called every few seconds while training waits for the disk.

    Attributes:
        stalled_s: seconds that training has waited for checkpoints.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, ranks: Ranks, beat: Callable[[], None]) -> None:
        self.shelf = Shelf(folder=folder, config=config)
        self.config = config
        self.ranks = ranks
        self.beat = beat
        # Collectives of the writing thread, which must not interleave with those of a step.
        self.peers = ranks.apart()
        self.stalled_s = 0.0
        self._stager: BlockingAsyncStager | None = None
        self._shapes: list[Any] = []
        self._pending: Future[Path] | None = None

    def save(
        self,
        state: CheckpointState,
        model: DistributedModelParallel,
        optimizer: KeyedOptimizer,
        *,
        metrics: dict[str, float] | None = None,
    ) -> Path:
        """Begin to write `folder/epoch-E-step-S`; returns its path, which is there when it is whole.

        Args:
            state: what to write of the run.
            model, optimizer: whose tensors to copy, now.
            metrics: what is known of the model's quality; rank 0's count.

        Raises:
            CheckpointError: this or the checkpoint before could not be written; older ones are as they were.
        """
        start = time.perf_counter()
        self.finish()
        target = self.shelf.folder / state.name
        staged = self._stage(tensors_of(model, optimizer))
        self._pending = _in_background(lambda: self._write(staged, state, target, metrics or {}))
        if not self.config.asynchronous:
            self.finish()
        self.stalled_s += time.perf_counter() - start
        return target

    def finish(self) -> None:
        """Wait until all ranks have the last checkpoint on disk; every rank calls this.

        Raises:
            CheckpointError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            while not self._all_wrote(pending):
                self.beat()
            pending.result()

    def _all_wrote(self, pending: Future[Path]) -> bool:
        """Whether every rank is done, after a while. Ranks ask each other here, as in a step, so that one that stopped
        is noticed as soon as there: the writing threads' own group waits for the slowest disk."""
        done = len(wait([pending], timeout=_BEAT_S).done)
        return int(self.ranks.sum(torch.tensor([done]))) == self.ranks.world_size

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._pending is not None and not self._pending.done()

    @property
    def failed(self) -> bool:
        """Whether the writing in progress has ended in an error, which `finish` raises."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def _stage(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """A copy in host memory, in the buffers of the last one."""
        shapes = _shapes(tensors)
        if self._stager is None or shapes != self._shapes:
            self._stager, self._shapes = BlockingAsyncStager(cache_staged_state_dict=True), shapes
            if self.ranks.device.type != "cuda":
                # Left to itself it pins the buffers, which only CUDA can.
                self._stager.state_dict_cache = BlockingAsyncStager().stage(tensors)
        return self._stager.stage(tensors)

    def _write(self, staged: dict[str, Any], state: CheckpointState, target: Path, metrics: dict[str, float]) -> Path:
        beside = target.with_name(f".{target.name}.writing")
        files = HashedFiles()

        def prepare() -> None:
            if self.ranks.is_first:
                shutil.rmtree(beside, ignore_errors=True)
                beside.mkdir(parents=True)

        def read_back() -> dict[str, tuple[int, str]]:
            check(beside, files.digests, from_disk=True)
            return files.digests

        def publish() -> None:
            if self.ranks.is_first:
                merged = {name: found for part in digests if part for name, found in part.items()}
                merged[STATE] = write_durably(beside / STATE, state_to_json(state))
                if metrics:
                    record_metrics(beside, metrics)
                write_manifest(beside, merged)
                _replace(beside, target)
                self.shelf.prune()

        self._together(target, prepare)
        try:
            dcp.save(
                staged,
                storage_writer=Writer(str(beside), files),
                # What a rank writes stays the same from one checkpoint to the next: planned once.
                planner=DefaultSavePlanner(enable_plan_caching=True),
                process_group=self.peers.host_group,
            )
        # DCP's own error is no Exception.
        except (Exception, dcp.CheckpointException) as error:
            # Every rank gets here: DCP gathers what went wrong on any of them.
            reasons = [str(e) for e in self.peers.gather(files.error) if e is not None]
            raise self._failure(target, reasons[0] if reasons else first_line(error)) from error
        digests = self._together(target, read_back)
        self._together(target, publish)
        return target

    def _together(self, target: Path, work: Callable[[], Result | None]) -> list[Result | None]:
        """Results of every rank's work; if any failed, all raise."""
        result, problem = None, ""
        try:
            result = work()
        except (OSError, CheckpointError) as error:
            problem = str(error) or type(error).__name__
        found = self.peers.gather((result, problem))
        if problems := [p for _, p in found if p]:
            raise self._failure(target, problems[0])
        return [r for r, _ in found]

    def _failure(self, target: Path, reason: str) -> CheckpointError:
        if self.ranks.is_first:
            shutil.rmtree(target.with_name(f".{target.name}.writing"), ignore_errors=True)
        last = newest(self.shelf.folder)
        kept = f"the last good one is {last}" if last is not None else "there is none before it"
        return CheckpointError(
            f"checkpoint {target} could not be written: {reason}; {kept}. Mend the cause (free space, rights) and "
            "run the same command to go on from there"
        )


def _in_background(work: Callable[[], Result]) -> Future[Result]:
    """Do the work in a thread that does not keep a failing process alive."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001  raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, name="trefoil-checkpoint", daemon=True).start()
    return future


def _replace(beside: Path, target: Path) -> None:
    """Put a whole checkpoint in its place, durably; one of the same step makes way only now."""
    old = target.with_name(f".{target.name}.removing")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    sync_folder(beside)
    os.replace(beside, target)
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _shapes(tensors: dict[str, Any]) -> list[Any]:
    """What makes two states alike enough to share buffers: names and sizes."""
    found: list[Any] = []
    for name, value in tensors.items():
        found.append((name, _shapes(value) if isinstance(value, dict) else tuple(value.size())))
    return found
