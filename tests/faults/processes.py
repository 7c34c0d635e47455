"""Ranks, launchers and clerks as forks of a process that has imported everything: one is up in a tenth of a second.

The tree is that of a cluster: whoever runs the campaign is the scheduler, a launcher starts ranks and ends them all
when one fails, and ranks are what trains. Each may be killed.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

# Between asking ranks to leave and killing them, once one has failed.
GRACE_S = 3.0


def fork(function: Callable[..., Any], *args: Any, log: Path) -> int:
    """Run `function(*args)` in a child whose output goes to `log`; returns its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    _child(function, args, log)


def _child(function: Callable[..., Any], args: tuple[Any, ...], log: Path) -> NoReturn:
    status = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        found = function(*args)
        status = found if isinstance(found, int) else 0
    except BaseException:  # noqa: BLE001  a child says what ended it, in its log
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # No atexit: what the parent registered is the parent's.
        os._exit(status)


def asked(function: Callable[..., Any], *args: Any, log: Path, timeout_s: float = 300.0) -> Any:
    """What `function(*args)` gives in a child of its own.

    Raises:
        AssertionError: it failed or did not end in time.
    """
    answer = log.with_suffix(".answer")
    answer.unlink(missing_ok=True)

    def run() -> None:
        value = function(*args)
        answer.write_bytes(pickle.dumps(value))

    child = fork(run, log=log)
    status = wait_for(child, timeout_s)
    assert status == 0, f"{function.__name__} ended with {status}: {log.read_text()[-2000:]}"
    return pickle.loads(answer.read_bytes())  # noqa: S301  written by our own child


def wait_for(child: int, timeout_s: float) -> int | None:
    """Exit status of a child, negative for a signal; None if it did not end in time, and was killed.

    Time in which this process itself was kept from running, a frozen machine's, does not count.
    """
    left, before = timeout_s, time.monotonic()
    while left > 0:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
        now = time.monotonic()
        left, before = left - min(now - before, 1.0), now
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def is_alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def launcher(rank: Callable[[int], Any], world_size: int, folder: Path) -> int:
    """Start ranks and wait for them as torchrun does: the first failure ends all; SIGTERM goes on to the ranks.

    Args:
        rank: what rank i runs.
        world_size: how many there are.
        folder: for their logs and `pids`, the process ids of launcher and ranks.
    """
    port, me = free_port(), os.getpid()

    def run(i: int) -> Any:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ |= {
            "RANK": str(i),
            "LOCAL_RANK": str(i),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        return rank(i)

    children = {fork(run, i, log=folder / f"rank-{i}.log"): i for i in range(world_size)}
    beside = folder / "pids.writing"
    beside.write_text(" ".join(map(str, [me, *children])))
    beside.replace(folder / "pids")
    signal.signal(signal.SIGTERM, lambda *_: _send(children, signal.SIGTERM))
    failed, deadline = 0, float("inf")
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            children.pop(pid, None)
            if status and not failed:
                failed, deadline = 1, time.monotonic() + GRACE_S
                _send(children, signal.SIGTERM)
        elif time.monotonic() > deadline:
            _send(children, signal.SIGKILL)
        else:
            time.sleep(0.02)
    return failed


def _send(children: dict[int, int], number: int) -> None:
    for child in list(children):
        try:
            os.kill(child, number)
        except ProcessLookupError:
            children.pop(child, None)
