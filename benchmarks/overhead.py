"""What telling of a run costs its steps: python -m benchmarks.overhead [--quick]

One rank trains the demo's model; every `log_steps` steps it records what a run records. Blocks of steps take turns:
with nobody told, with a bar on a terminal, with MLflow's embedded store, and with a server that refuses connections,
that takes them and never answers, and (not with --quick) that is killed in the middle of the block. A figure is the
median over rounds of a block's time over that of the block told to nobody in the same round, with the rounds' middle
half. 1.01 is the most that is promised for a server that is down.

`X_over_nobody` is of the clock on the wall, and off by several per cent on a busy machine. `X_processor_over_nobody` is
of the processor time of the whole process, which others disturb less but still by more than a per cent.

`X_share` is measured where the time goes, and no noise of the steps hides it: the time that the training thread spends
in the tracker, by the clock on the wall (`X_caller_share`), and the processor time that the sending thread takes for
the block's records, sent during the block or, where it pauses, asked of it right after (`X_sender_share`); both over
the processor time of the same steps told to nobody. The sender holds up the steps by no more than it computes: it has
Python's lock for no longer than that, and waits for a server without it. So the sum bounds what a step is slowed by:
the median over rounds, the rounds' middle half, and the largest. What the two threads take from each other's caches is
not in it.

It says nothing of a GPU, whose steps leave the processor to the sender.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path

from rich.console import Console

from benchmarks.common import Report
from pipeline.data.logs import Dataset
from pipeline.data.simulate import SimulationConfig, simulate
from pipeline.progress import Bar
from pipeline.recipes.demo import demo
from pipeline.tracking import NullTracker, Tracker, connect
from pipeline.tracking.store import URI_VARIABLE
from pipeline.train.sharding import joined
from pipeline.train.trainer import Trainer

# Most seconds until a server answers: ten on an idle machine.
START_S = 240
# Most seconds that a block waits for a sender which waits for a silent server.
SILENCE_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    requests: int = 6_000
    rounds: int = 7
    steps: int = 100
    """Steps of a block."""
    log_steps: int = 50
    """Steps between two records, as in a run."""
    metrics: int = 90
    """Values of a record; the demo's has 65 for two tasks."""
    killed: bool = True
    """Measure a real server that is killed too."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """What a block of steps took, in seconds: by the clock on the wall, and of the processor; the training thread in
    the tracker, by the clock on the wall; and the sending thread, of the processor."""

    wall: float
    processor: float
    caller: float
    sender: float


class Server:
    """A real `mlflow server` on a free port of loopback, on a sqlite store under `root` that is made once.

    It can be killed and started again at the same address; what it says is in `root/server.log`.
    """

    def __init__(self, root: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.root, self.uri = root, f"http://127.0.0.1:{self.port}"
        connect(root, uri=f"sqlite:///{root / 'mlflow.db'}")

    def start(self) -> None:
        """Start it, and wait until it answers.

        Raises:
            RuntimeError: it did not come up.
        """
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--backend-store-uri", f"sqlite:///{self.root / 'mlflow.db'}"]
        command += ["--artifacts-destination", str(self.root / "artifacts")]
        environment = {name: value for name, value in os.environ.items() if name != URI_VARIABLE}
        with (self.root / "server.log").open("a") as said:
            self.process = subprocess.Popen(
                command,
                cwd=self.root,
                start_new_session=True,
                env=environment | {"MLFLOW_DISABLE_TELEMETRY": "true"},
                stdout=said,
                stderr=said,
            )
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=10):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise RuntimeError("the server did not come up: " + (self.root / "server.log").read_text()[-2000:])

    def kill(self) -> None:
        """Kill it and all its workers; nothing where it has ended."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@contextmanager
def address(uri: str | None) -> Iterator[None]:
    """MLflow's address as a user would give it."""
    before = os.environ.pop(URI_VARIABLE, None)
    if uri is not None:
        os.environ[URI_VARIABLE] = uri
    try:
        yield
    finally:
        os.environ.pop(URI_VARIABLE, None)
        if before is not None:
            os.environ[URI_VARIABLE] = before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter blocks, no real server")
    quick = parser.parse_args().quick
    settings = Settings(requests=2_000, rounds=3, steps=50, killed=False) if quick else Settings()
    logging.getLogger("pipeline.tracking").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name, joined() as ranks, silent_server() as silent:
        folder = Path(name)
        simulate(folder / "log", SimulationConfig(requests=settings.requests, users=500, items=500))
        config = replace(demo(), epochs=10_000, log_steps=1_000_000)
        trainer = Trainer(config, Dataset.open(folder / "log"), ranks, folder / "run")
        trainer.model.train()
        steps = trainer.steps(cycle(list(trainer.loader.batches(0))))
        server = Server(folder / "server") if settings.killed else None
        sides = _sides(settings, steps, folder, silent, server)
        for _ in islice(steps, settings.steps):
            pass
        found: dict[str, list[Block]] = {side: [] for side in sides}
        for _ in range(settings.rounds):
            for side, run in sides.items():
                found[side].append(run())
    Report("overhead", settings).finish(_figures(found, settings.steps))


def _figures(found: dict[str, list[Block]], steps: int) -> dict[str, object]:
    nobody = found.pop("nobody")
    figures: dict[str, object] = {"step_ms": 1e3 * statistics.median(block.wall for block in nobody) / steps}
    for side, blocks in found.items():
        figures[f"{side}_over_nobody"] = _middle(a.wall / b.wall for a, b in zip(blocks, nobody, strict=True))
    for side, blocks in found.items():
        ratios = (a.processor / b.processor for a, b in zip(blocks, nobody, strict=True))
        figures[f"{side}_processor_over_nobody"] = _middle(ratios)
    alone = statistics.median(block.processor for block in nobody)
    for side, blocks in found.items():
        if side == "bar":
            continue
        shares = [(block.caller + block.sender) / alone for block in blocks]
        figures[f"{side}_share"] = [*_middle(shares), max(shares)]
        figures[f"{side}_caller_share"] = _middle(block.caller / alone for block in blocks)
        figures[f"{side}_sender_share"] = _middle(block.sender / alone for block in blocks)
    return figures


def _middle(values: Iterable[float]) -> list[float]:
    """Median, and the ends of the middle half."""
    low, middle, high = statistics.quantiles(values, n=4)
    return [middle, low, high]


def _sides(
    settings: Settings, steps: Iterator[object], folder: Path, silent: str, server: Server | None
) -> dict[str, Callable[[], Block]]:
    rounds = iter(range(10_000))

    def block(
        tracker: Tracker,
        bar: Bar | None = None,
        at_half: Callable[[], None] | None = None,
        sender: threading.Thread | None = None,
    ) -> Block:
        values = {f"metric/{i}": float(i) for i in range(settings.metrics)}
        caller = 0.0

        def now() -> tuple[float, float, float]:
            sent = 0.0
            if sender is not None and sender.ident is not None:
                sent = time.clock_gettime(time.pthread_getcpuclockid(sender.ident))
            return time.perf_counter(), time.process_time(), sent

        pauses, begun = (0.0, 0.0, 0.0), now()
        for done, _ in enumerate(islice(steps, settings.steps), 1):
            if done % settings.log_steps == 0:
                called = time.perf_counter()
                tracker.log_metrics(values, step=done)
                caller += time.perf_counter() - called
            if bar is not None:
                bar(done, settings.steps + 1, "epoch 1 of 1")
            if done == settings.steps // 2 and at_half is not None:
                before = now()
                at_half()  # killing is not the run's work
                pauses = tuple(after - earlier for after, earlier in zip(now(), before, strict=True))
        ended = now()
        wall, processor, _ = (e - b - p for e, b, p in zip(ended, begun, pauses, strict=True))
        # What waits for the sender's next turn is part of what the block costs.
        tracker.flush(patience_s=SILENCE_S)
        return Block(wall=wall, processor=processor, caller=caller, sender=now()[2] - begun[2])

    def tracked(uri: str | None, at_half: Callable[[], None] | None = None) -> Block:
        with address(uri):
            run, others = folder / "runs" / str(next(rounds)), set(threading.enumerate())
            tracker = Tracker.start("run", run_dir=run, root=folder / "store", rank=0)
            tracker.flush(patience_s=SILENCE_S)  # a run has long begun when its steps are looked at
            (sender,) = set(threading.enumerate()) - others
            took = block(tracker, at_half=at_half, sender=sender)
            tracker.finish(patience_s=0.0)
            return took

    def drawn() -> Block:
        console = Console(file=io.StringIO(), force_terminal=True, width=120)
        with Bar(console, "steps") as bar:
            return block(NullTracker(), bar)

    def killed() -> Block:
        assert server is not None
        server.start()
        try:
            return tracked(server.uri, server.kill)
        finally:
            server.kill()

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody_listens = f"http://127.0.0.1:{free.getsockname()[1]}"
    sides: dict[str, Callable[[], Block]] = {
        "nobody": lambda: block(NullTracker()),
        "bar": drawn,
        "embedded": lambda: tracked(None),
        "refused": lambda: tracked(nobody_listens),
        "silent": lambda: tracked(silent),
    }
    return sides | ({"killed": killed} if server is not None else {})


@contextmanager
def silent_server() -> Iterator[str]:
    """An address that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


if __name__ == "__main__":
    main()
