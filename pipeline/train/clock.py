"""Where the time of a step goes: one clock that is always in exactly one part."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Of a step, in order: for the loader; ids sent to the ranks that hold their rows; tables looked up and rows sent back
# (forward); the dense part and the losses; all gradients, tables' updates within; dense updates; what is left.
PARTS = ("wait", "exchange", "lookup", "forward", "backward", "optimizer", "other")


class StepClock:
    """Seconds spent in each of `PARTS` since they were last read.

    On CUDA the parts are those of the device's stream, taken from events that nothing waits for until `read`.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._spans: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._part = "other"
        self._since = self._now()

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def switch(self, part: str) -> str:
        """What follows belongs to `part`; returns the part that ends."""
        now, ended = self._now(), self._part
        if isinstance(now, float) and isinstance(self._since, float):
            self._seconds[ended] += now - self._since
        elif isinstance(now, torch.cuda.Event) and isinstance(self._since, torch.cuda.Event):
            self._spans.append((ended, self._since, now))
        self._part, self._since = part, now
        return ended

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        """A part within another, which goes on afterwards."""
        interrupted = self.switch(part)
        try:
            yield
        finally:
            self.switch(interrupted)

    def read(self) -> dict[str, float]:
        """Seconds by part since the last reading. On CUDA it waits for the device."""
        self.switch(self._part)
        if self._spans:
            self._spans[-1][2].synchronize()
            for part, start, end in self._spans:
                self._seconds[part] += start.elapsed_time(end) / 1e3
            self._spans.clear()
        seconds, self._seconds = self._seconds, dict.fromkeys(PARTS, 0.0)
        return seconds
