"""This process as a rank of a run: told of SIGTERM, watched, alone in the run's folder, its state written down."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from pipeline.config import RunConfig, config_from_json, config_to_json, flat_config
from pipeline.errors import ConfigError, without_passwords
from pipeline.train.sharding import Ranks, joined
from pipeline.train.supervision import Supervision, stacks_file

CONFIG = "config.json"
STATUS = "status.json"
# A rank that hangs writes its stacks this much before the others give up waiting for it.
COLLECTIVE_MARGIN_S = 60.0
# How long a job waits for the one before it to leave its folder: as long as ranks may take that were told to leave.
FOLDER_PATIENCE_S = 120.0
# Fields that are named where a folder holds a run of another configuration.
SHOWN = 3


def is_first() -> bool:
    """Whether this process is the one that speaks for all ranks."""
    return os.environ.get("RANK", "0") == "0"


def is_worker() -> bool:
    """Whether a launcher (torchrun, TorchX) started this process as one of its ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextmanager
def member(config: RunConfig, folder: Path) -> Iterator[tuple[Ranks, Supervision]]:
    """This process as a rank of a run: told of SIGTERM, watched, its state written to RUN/status.json.

    Raises:
        ConfigError: the folder holds a run of another configuration.
    """
    stacks = stacks_file(folder, int(os.environ.get("RANK", "0")))
    with ExitStack() as stack:
        supervision = stack.enter_context(Supervision(stacks, config.timeout_s))
        # Watched, because if the first rank stops before it has joined, the others wait in its store for ever.
        with supervision.watching():
            # Ranks that wait for a hung one must outlive the watch, so that it can write their stacks too.
            ranks = stack.enter_context(joined(timeout_s=config.timeout_s + COLLECTIVE_MARGIN_S))
        stack.enter_context(_alone(folder, ranks, patience_s=min(FOLDER_PATIENCE_S, config.timeout_s)))
        if ranks.is_first:
            _claim(folder, config)
            write_status(folder, ranks, "running")
        ranks.barrier()
        try:
            yield ranks, supervision
        except BaseException as error:
            write_status(folder, ranks, "failed", error=without_passwords(error).splitlines()[:1])
            raise


@contextmanager
def _alone(folder: Path, ranks: Ranks, *, patience_s: float) -> Iterator[None]:
    """Hold the folder of the run: ranks that outlived their launcher would write beside those that take over.

    Raises:
        ConfigError: another job has been at work in the folder for too long.
    """
    if not ranks.is_first:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    end, told = time.monotonic() + patience_s, False
    with (folder / ".lock").open("a+") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it when the process dies
                break
            except BlockingIOError:
                file.seek(0)
                if time.monotonic() > end:
                    raise ConfigError(
                        f"another job is at work in {folder} ({file.read().strip()}); wait for it or stop it, or give "
                        "another --run-dir"
                    ) from None
                if not told:
                    print(f"waiting up to {patience_s:g} s for the job before to leave {folder}", file=sys.stderr)
                told = True
                time.sleep(0.1)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _claim(folder: Path, config: RunConfig) -> None:
    """Write the run's configuration; a folder of another run is an error."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CONFIG
    there = config_from_json(path.read_bytes(), source=str(path)) if path.exists() else config
    if there != config:
        raise ConfigError(
            f"{folder} holds a run of another configuration: {_differences(there, config)}; give the same recipe and "
            "flags to go on with it, or another --run-dir to start anew"
        )
    path.write_bytes(config_to_json(config))


def _differences(there: RunConfig, here: RunConfig) -> str:
    """The first fields that differ, such as "epochs 1 there, 2 here"."""
    ours, theirs = flat_config(here), flat_config(there)
    fields = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    shown = [f"{name} {theirs.get(name, 'none')} there, {ours.get(name, 'none')} here" for name in fields[:SHOWN]]
    return "; ".join(shown) + (f"; and {len(fields) - SHOWN} more fields" if len(fields) > SHOWN else "")


def write_status(folder: Path, ranks: Ranks, state: str, **more: object) -> None:
    """Say in RUN/status.json how far a run is: running, pre-empted, finished or failed. The first rank writes."""
    if ranks.is_first:
        status = {"state": state, "ranks": ranks.world_size, "time": datetime.now(UTC).isoformat(), **more}
        beside = folder / f".{STATUS}.writing"
        beside.write_text(json.dumps(status, indent=1) + "\n")
        os.replace(beside, folder / STATUS)
