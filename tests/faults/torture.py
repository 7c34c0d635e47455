"""Crash campaign: `python -m tests.faults.torture --runs 100`.

Each run is a small training job on two ranks, through the job that `trefoil train` runs. It is struck at random
moments (see `attacks`) and started again each time, some with one or three ranks, until it ends; then some are
exported and some promoted, struck as well. What must be nought is printed and written as JSON as the last line; the
status is 1 if any is not.

Runs that kept two ranks must end with the undisturbed run's parameters bit for bit. Other numbers of ranks add
gradients in another order, so those runs must end within `TOLERANCE` of it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlflow.store.model_registry.sqlalchemy_store
import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import Report
from pipeline.tracking import connect, sync
from pipeline.train.checkpoint.shelf import newest
from tests.faults import work
from tests.faults.attacks import Blow, draw
from tests.faults.processes import asked, fork, is_alive, launcher, wait_for
from tests.rollout.models import log_model

ATTEMPTS = 12
ATTEMPT_S = 400.0
# Largest difference of a parameter from the undisturbed run's after other numbers of ranks: sums in another order,
# through Adam, over 22 steps of rate 5e-3.
TOLERANCE = 1e-4
# A process that forks must have one thread, and its runs keep their records in a store of their own.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": ""}


@dataclass
class Tally:
    """What became of all runs."""

    runs: int = 0
    attempts: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    places: Counter[str] = field(default_factory=Counter)
    samples_lost: int = 0
    samples_repeated: int = 0
    checkpoints_unreadable: int = 0
    other_parameters: int = 0
    largest_difference: float = 0.0
    unfinished: int = 0
    artifacts_unreadable: int = 0
    promotions_unsound: int = 0
    records_lost: int = 0
    processes_left: int = 0
    hung: int = 0
    same_ranks: int = 0
    problems: list[str] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        counted = {
            "runs": self.runs,
            "attempts": self.attempts,
            "kills": sum(self.kills.values()),
            "kills_by_how": dict(sorted(self.kills.items())),
            "kills_by_place": dict(sorted(self.places.items())),
            "runs_of_two_ranks_throughout": self.same_ranks,
            "largest_difference_after_other_ranks": self.largest_difference,
        }
        return counted | self.noughts() | {"problems": self.problems}

    def noughts(self) -> dict[str, int]:
        """What must be 0."""
        names = (
            "samples_lost",
            "samples_repeated",
            "checkpoints_unreadable",
            "other_parameters",
            "unfinished",
            "artifacts_unreadable",
            "promotions_unsound",
            "records_lost",
            "processes_left",
            "hung",
        )
        return {name: getattr(self, name) for name in names}


class Campaign:
    """Runs and their tally.

    Args:
        root: folder for all of it.
        seed: of what happens; run i of a seed is always struck alike.
        places: where blows may fall besides training: export, promotion.
    """

    def __init__(self, root: Path, seed: int, *, places: tuple[str, ...] = ("export", "promotion")) -> None:
        self.root, self.seed, self.places = root, seed, places
        self.tally = Tally()
        self.data = work.log(root / "log")
        self.home = root / "home"
        self.home.mkdir()
        asked(self._make_store, log=root / "store.log")
        folder, start = root / "reference", time.monotonic()
        attempts = self._train(folder, [None], [2])
        assert (folder / "status.json").exists(), (attempts[0] / "rank-0.log").read_text()
        self.duration_s = time.monotonic() - start
        self.reference = self._last(folder)
        self.expected = asked(work.weights, self.reference, log=root / "weights.log")
        self.metrics = asked(self._recorded, folder, log=root / "recorded.log")
        self.model_uri = ""
        self.export_s = self.promotion_s = 0.0
        if "export" in places:
            (attempt := root / "exports").mkdir()
            artifact = attempt / "reference"
            self.export_s = asked(
                work.make_artifact, self.reference, self.data, artifact, attempt, None, log=attempt / "log"
            )
            self.scores = asked(work.scores, artifact, self.data, log=attempt / "scores.log")
        if "promotion" in places:
            self.model_uri = asked(log_model, self.home, log=root / "model.log")
            attempt = root / "promotions"
            attempt.mkdir()
            asked(work.prepare_surface, self.home, "reference", self.model_uri, log=attempt / "log")
            self.promotion_s = asked(
                work.promote_challenger, self.home, "reference", attempt, None, log=attempt / "promote.log"
            )

    def _make_store(self) -> None:
        connect(self.home)

    def run(self, number: int) -> None:
        """One run, struck and started again until it ends."""
        rng = random.Random(f"{self.seed}/{number}")
        folder = self.root / f"run-{number}"
        blows: list[Blow | None] = [draw(rng, 2, self.duration_s) for _ in range(rng.choice((1, 1, 2, 3)))]
        ranks = [2, *(rng.choice((2, 2, 1, 3)) for _ in range(ATTEMPTS))] if rng.random() < 0.4 else [2] * ATTEMPTS
        attempts = self._train(folder, blows, ranks)
        self._judge(number, folder, attempts, ranks[: len(attempts)])
        if "export" in self.places and number % 8 == 0:
            self._strike_export(number, rng)
        if "promotion" in self.places and number % 3 == 0:
            self._strike_promotion(number, rng)
        self.tally.runs += 1
        if not self.tally.problems:
            shutil.rmtree(folder)

    def _train(self, folder: Path, blows: list[Blow | None], ranks: list[int]) -> list[Path]:
        """Attempts at a run until one finishes; returns their folders."""
        attempts: list[Path] = []
        for number in range(min(ATTEMPTS, len(ranks))):
            attempt = folder.with_name(f"{folder.name}.attempts") / str(number)
            attempt.mkdir(parents=True)
            attempts.append(attempt)
            blow = blows[number] if number < len(blows) else None
            if blow is not None and blow.victim >= ranks[number]:
                blow = replace(blow, victim=0)
            if blow is not None and blow.how == "stop" and ranks[number] == 1:
                blow = replace(blow, how="kill_one")  # a rank that stops alone has no peers to notice it

            def rank(i: int, attempt: Path = attempt, blow: Blow | None = blow) -> Any:
                return work.train(i, self.data, folder, attempt, self.home, blow)

            child = fork(launcher, rank, ranks[number], attempt, log=attempt / "launcher.log")
            status = wait_for(child, ATTEMPT_S)
            self.tally.attempts += 1
            if status is None:
                self.tally.hung += 1
                self.tally.problems.append(f"{folder.name}: nobody noticed in {ATTEMPT_S:g} s what came of {blow}")
            if (attempt / "struck").exists() and blow is not None:
                self.tally.kills[blow.how] += 1
                self.tally.places[blow.where] += 1
            for problem in work.unreadable(folder) if folder.exists() else ():
                self.tally.checkpoints_unreadable += 1
                self.tally.problems.append(f"{folder.name}: after {blow}: {problem}")
            if status == 0 and self._state(folder) == "finished":
                break
        self._bury(folder, attempts)
        return attempts

    def _judge(self, number: int, folder: Path, attempts: list[Path], ranks: list[int]) -> None:
        tally = self.tally
        if self._state(folder) != "finished":
            tally.unfinished += 1
            logs = "".join(p.read_text()[-1500:] for p in sorted(attempts[-1].glob("rank-*.log")))
            tally.problems.append(f"run {number} did not finish in {len(attempts)} attempts: {logs}")
            return
        lost, repeated = work.trained_on([(a, self._start(a)) for a in attempts])
        tally.samples_lost += lost
        tally.samples_repeated += repeated
        found = asked(work.weights, self._last(folder), log=attempts[-1] / "weights.log")
        difference = max(float(np.max(np.abs(found[n] - v), initial=0.0)) for n, v in self.expected.items())
        if set(ranks) == {2}:
            tally.same_ranks += 1
            same = all(np.array_equal(found[n], v) for n, v in self.expected.items())
        else:
            tally.largest_difference = max(tally.largest_difference, difference)
            same = difference <= TOLERANCE
        if not same or found.keys() != self.expected.keys():
            tally.other_parameters += 1
            tally.problems.append(f"run {number} ends with other parameters (by {difference:.2e}, ranks {ranks})")
        if lost or repeated:
            tally.problems.append(f"run {number} lost {lost} and repeated {repeated} samples")
        expected = self.metrics if set(ranks) == {2} else {(n, s) for n, s in self.metrics if not _of_one_rank(n)}
        missing = expected - asked(self._recorded, folder, log=attempts[-1] / "recorded.log")
        if missing:
            tally.records_lost += len(missing)
            tally.problems.append(f"run {number} lacks records in MLflow: {sorted(missing)[:3]}")

    def _recorded(self, folder: Path) -> set[tuple[str, int]]:
        """(metric, step) of what has reached MLflow, after a last `trefoil sync`."""
        sent = sync(folder)
        client = connect(self.home)
        names = client.get_run(sent.run_id).data.metrics
        return {(n, m.step) for n in names for m in client.get_metric_history(sent.run_id, n)}

    def _strike_export(self, number: int, rng: random.Random) -> None:
        attempt = self.root / "exports" / str(number)
        attempt.mkdir()
        out = attempt / "artifact"
        blow = Blow(where="anywhere", nth=0, how="kill_one", victim=0, delay_s=rng.uniform(0, self.export_s))
        child = fork(work.make_artifact, self.reference, self.data, out, attempt, blow, log=attempt / "log")
        wait_for(child, ATTEMPT_S)
        self._count("export", attempt)
        try:
            if not out.exists():
                asked(work.make_artifact, self.reference, self.data, out, attempt, None, log=attempt / "again.log")
            found = asked(work.scores, out, self.data, log=attempt / "scores.log")
            if found != self.scores:
                raise AssertionError("the artifact scores differently")
        except AssertionError as error:
            self.tally.artifacts_unreadable += 1
            self.tally.problems.append(f"run {number}, export: {error}")

    def _strike_promotion(self, number: int, rng: random.Random) -> None:
        attempt = self.root / "promotions" / str(number)
        attempt.mkdir()
        surface = f"run{number}"
        asked(work.prepare_surface, self.home, surface, self.model_uri, log=attempt / "prepare.log")
        blow = Blow(where="anywhere", nth=0, how="kill_one", victim=0, delay_s=rng.uniform(0, self.promotion_s))
        child = fork(work.promote_challenger, self.home, surface, attempt, blow, log=attempt / "log")
        wait_for(child, ATTEMPT_S)
        self._count("promotion", attempt)
        if problem := asked(work.promotion_is_sound, self.home, surface, log=attempt / "sound.log"):
            self.tally.promotions_unsound += 1
            self.tally.problems.append(f"run {number}, promotion: {problem}")

    def _count(self, place: str, attempt: Path) -> None:
        if (attempt / "struck").exists():
            self.tally.kills["kill_one"] += 1
            self.tally.places[place] += 1

    def _bury(self, folder: Path, attempts: list[Path]) -> None:
        """No process of a run outlives it: orphans of a killed launcher must have left by themselves."""
        pids = [
            pid for a in attempts if (a / "pids").exists() for pid in map(int, (a / "pids").read_text().split()[1:])
        ]
        for pid in pids:
            if is_alive(pid):
                self.tally.processes_left += 1
                self.tally.problems.append(f"{folder.name}: process {pid} is left")
                os.kill(pid, signal.SIGKILL)

    @staticmethod
    def _last(folder: Path) -> Any:
        return newest(folder / "checkpoints")

    @staticmethod
    def _start(attempt: Path) -> tuple[int, int]:
        """Where an attempt went on from, by what it said itself."""
        said = (attempt / "console.txt").read_text() if (attempt / "console.txt").exists() else ""
        name = said.partition("going on from ")[2].split("\n")[0].rpartition("/")[2] or "epoch-0-step-0"
        _, epoch, _, step = name.split("-")
        return int(epoch), int(step)

    @staticmethod
    def _state(folder: Path) -> str:
        path = folder / "status.json"
        return str(json.loads(path.read_text())["state"]) if path.exists() else ""


def _of_one_rank(metric: str) -> bool:
    """Whether a metric is of the first rank's rows alone: which surfaces these have depends on the number of ranks."""
    return metric.startswith(("train/gates/", "train/unique_ids/"))


def show(tally: Tally, seconds: float) -> None:
    """The table."""
    table = Table(title=f"crash campaign, {seconds:.0f} s")
    table.add_column("what")
    table.add_column("number", justify="right")
    for name, value in tally.figures().items():
        if name == "problems":
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        style = "red" if name in tally.noughts() and value else None
        table.add_row(name.replace("_", " "), f"{value:.2e}" if isinstance(value, float) else str(value), style=style)
    Console(width=120).print(table)
    for problem in tally.problems:
        print("-", problem)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="number of the first run, to repeat one of a campaign")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many")
    parser.add_argument("--training-only", action="store_true", help="neither export nor promote")
    parser.add_argument("--keep", type=Path, help="folder to work in and keep; a temporary one by default")
    args = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **ENVIRONMENT})
    torch.set_num_threads(1)
    threads = len(os.listdir("/proc/self/task"))
    root = args.keep or Path(tempfile.mkdtemp(prefix="trefoil-torture-"))
    root.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    print(f"preparing in {root} ({threads} thread(s))", flush=True)
    campaign = Campaign(root, args.seed, places=() if args.training_only else ("export", "promotion"))
    print(f"the undisturbed run took {campaign.duration_s:.1f} s", flush=True)
    for number in range(args.first, args.first + args.runs):
        if time.monotonic() - start > 60 * args.minutes:
            break
        campaign.run(number)
        tally = campaign.tally
        print(
            f"run {number}: {tally.attempts} attempts, {sum(tally.kills.values())} kills so far, "
            f"{time.monotonic() - start:.0f} s; {len(tally.problems)} problem(s)",
            flush=True,
        )
    show(campaign.tally, time.monotonic() - start)
    if args.keep is None and not campaign.tally.problems:
        shutil.rmtree(root)
    settings = {"seed": args.seed, "first": args.first, "tolerance": TOLERANCE}
    Report("torture", settings).finish(campaign.tally.figures())
    return 1 if any(campaign.tally.noughts().values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
