"""Where a run is struck, how, and by whom: drawn from a seed, carried out inside the process that is struck."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOW = ("kill_one", "kill_all", "kill_launcher", "terminate", "stop")
# Events of one attempt at each place, roughly; a blow drawn past the last of them falls into the void.
PLACES = {"loader": 12, "step": 22, "checkpoint": 90, "anywhere": 1}


@dataclass(frozen=True, kw_only=True)
class Blow:
    """One blow.

    Args:
        where: in the loader's reading, between two steps, in the writing of a checkpoint, or at any time at all.
        nth: event at that place.
        how: SIGKILL to one rank, to all, or to the launcher; SIGTERM to the launcher; SIGSTOP to one rank.
        victim: rank that counts the events, and is the one that is struck.
        delay_s: from the event, or from the start, to the blow.
    """

    where: str
    nth: int
    how: str
    victim: int
    delay_s: float

    def __str__(self) -> str:
        return f"{self.how} in {self.where} (event {self.nth} of rank {self.victim}, {1000 * self.delay_s:.1f} ms on)"


def draw(rng: random.Random, ranks: int, duration_s: float) -> Blow:
    """A blow against an attempt of `ranks` ranks that would last `duration_s`."""
    where = rng.choice(list(PLACES))
    delay = rng.uniform(0, duration_s) if where == "anywhere" else rng.choice((0.0, rng.uniform(0, 0.01)))
    return Blow(
        where=where,
        nth=rng.randrange(PLACES[where]),
        how=rng.choice(HOW),
        victim=rng.randrange(ranks),
        delay_s=delay,
    )


class Striker:
    """Counts events in one process and strikes at the right one.

    Args:
        blow: what to do; None does nothing.
        folder: of the attempt, where `pids` lies and `struck` is written.
    """

    def __init__(self, blow: Blow | None, folder: Path) -> None:
        self.blow = blow
        self.folder = folder
        self._counts: dict[str, int] = {}
        self._lock = threading.Lock()

    def begin(self) -> None:
        """The process has started."""
        self.event("anywhere")

    def event(self, where: str) -> None:
        """Something happens at a place."""
        blow = self.blow
        if blow is None or blow.where != where:
            return
        with self._lock:
            count = self._counts.get(where, 0)
            self._counts[where] = count + 1
        if count != blow.nth:
            return
        if blow.delay_s:
            threading.Thread(target=self._later, args=(blow.delay_s,), daemon=True).start()
        else:
            self._strike()

    def around(self, where: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with an event before it and one behind it."""

        def struck(*args: Any, **kwargs: Any) -> Any:
            self.event(where)
            result = function(*args, **kwargs)
            self.event(where)
            return result

        return struck

    def _later(self, seconds: float) -> None:
        time.sleep(seconds)
        self._strike()

    def _strike(self) -> None:
        assert self.blow is not None, "only a blow is struck"
        while not (self.folder / "pids").exists():
            time.sleep(0.001)
        launcher, *ranks = map(int, (self.folder / "pids").read_text().split())
        (self.folder / "struck").write_text(str(self.blow))
        me = os.getpid()
        match self.blow.how:
            case "kill_one":
                os.kill(me, signal.SIGKILL)
            case "kill_all":
                for pid in [p for p in ranks if p != me]:
                    os.kill(pid, signal.SIGKILL)
                os.kill(me, signal.SIGKILL)
            case "kill_launcher":
                os.kill(launcher, signal.SIGKILL)
            case "terminate":
                os.kill(launcher, signal.SIGTERM)
            case "stop":
                os.kill(me, signal.SIGSTOP)
