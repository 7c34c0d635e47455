"""How far long work is: told by whoever does it, drawn where a person looks at a terminal."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Drawing
    from rich.progress import TaskID

# Seconds between two drawings. One takes about a millisecond of whoever works, who draws by himself: a thread that did
# would want Python's lock in the middle of his steps.
EVERY_S = 0.25


class Progress(Protocol):
    """Told how far a piece of work is."""

    def __call__(self, done: float, total: float, what: str = "") -> None:
        """So much of a piece is done.

        Args:
            done: of it; equal to `total` at its end.
            total: of it.
            what: the piece, in a few words.
        """


def untold(done: float, total: float, what: str = "") -> None:
    """Progress that nobody follows."""


class Bar:
    """A bar with a rate and the time left while a piece of work lasts; a piece whose end was told gives way to the
    next. Nothing where nobody would see it: in a file or pipe, on a terminal that cannot move its cursor, and for a
    console that is quiet.

    Use it as a context manager, so that an error leaves the terminal as it was.

    Args:
        console: where to draw; what is printed to it meanwhile stands above the bar.
        unit: what is counted.
    """

    def __init__(self, console: Console, unit: str) -> None:
        self._console, self._unit = console, unit
        self._shown = console.is_terminal and not console.is_dumb_terminal and not console.quiet
        self._drawing: Drawing | None = None
        self._task: TaskID
        self._next = 0.0

    def __call__(self, done: float, total: float, what: str = "") -> None:
        """See `Progress`."""
        if not self._shown:
            return
        if done >= total:
            self.close()
            return
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + EVERY_S
        if self._drawing is None:
            self._drawing = _drawing(self._console, self._unit)
            self._drawing.start()
            # What was done before, where work is gone on with, counts, but not for the rate.
            self._task = self._drawing.add_task(what, total=total, completed=int(done))
        self._drawing.update(self._task, completed=done, total=total, description=what)
        self._drawing.refresh()

    def close(self) -> None:
        """Take the bar away."""
        if self._drawing is not None:
            self._drawing.stop()
        self._drawing = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _drawing(console: Console, unit: str) -> Drawing:
    from rich.progress import BarColumn, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Drawing
    from rich.progress import Task as Row
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Row) -> Text:
            return Text(f"{task.speed:,.1f}/s" if task.speed else "", style="progress.data.speed")

    return Drawing(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        TextColumn(f"{{task.completed:,.0f}}/{{task.total:,.0f}} {unit}"),
        Rate(),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
        auto_refresh=False,
        transient=True,
        # What is printed for machines is not ours to put above a bar.
        redirect_stdout=not console.stderr,
    )
