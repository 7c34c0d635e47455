"""A rank whose launcher is killed: told to leave where that launcher had all ranks, ended where there are others."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import job
from pipeline.config import CheckpointConfig
from pipeline.data.logs import Dataset
from pipeline.errors import ConfigError
from pipeline.job import membership
from pipeline.train.checkpoint import CheckpointWriter
from pipeline.train.sharding import Ranks, joined
from pipeline.train.supervision import Supervision
from pipeline.train.trainer import Trainer
from tests.train.runs import tiny_config

RANK = """
import sys, time
from pathlib import Path
from pipeline.train.supervision import Supervision

with Supervision() as supervision:
    Path(sys.argv[1]).write_text("ready")
    while not supervision.leaving:
        time.sleep(0.02)
    Path(sys.argv[1]).write_text("told to leave")
"""
LAUNCHER = """
import subprocess, sys
process = subprocess.Popen([sys.executable, "-c", *sys.argv[1:]])
print(process.pid, flush=True)
process.wait()
"""


@pytest.mark.parametrize(("ranks_here", "last_word"), [("2", "told to leave"), ("1", "ready")])
def test_a_rank_whose_launcher_is_killed(tmp_path: Path, ranks_here: str, last_word: str) -> None:
    said = tmp_path / "said"
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": ranks_here}
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, RANK, str(said)], env=environment, stdout=subprocess.PIPE, text=True
    ) as launcher:
        assert launcher.stdout is not None
        rank = int(launcher.stdout.readline())
        wait_until(lambda: said.exists() and said.read_text() == "ready")
        launcher.kill()
        wait_until(lambda: not running(rank))
    assert said.read_text() == last_word


def running(process: int) -> bool:
    """Whether a process, not ours to wait for, is neither gone nor a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(what: Callable[[], bool], timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_ranks_join_under_watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the first rank stops while they do, the others wait in its store, which has no time-out of its own."""
    said: list[str] = []
    real = membership.joined

    def joined(*, timeout_s: float) -> Any:
        said.append("joining")
        return real(timeout_s=timeout_s)

    monkeypatch.setattr(membership, "joined", joined)
    monkeypatch.setattr(membership.Supervision, "beat", lambda _: said.append("watched"))
    monkeypatch.setattr(membership.Supervision, "rest", lambda _: said.append("joined"))
    with job.member(tiny_config(), tmp_path):
        assert said == ["watched", "joining", "joined"]


def test_groups_are_made_under_watch(tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store that ranks meet in has no time-out that holds if the rank that keeps it has stopped."""
    said: list[str] = []
    real = Ranks.apart

    def apart(ranks: Ranks) -> Ranks:
        said.append("apart")
        return real(ranks)

    monkeypatch.setattr(Ranks, "apart", apart)
    monkeypatch.setattr(Supervision, "beat", lambda _: said.append("watched"))
    monkeypatch.setattr(Supervision, "rest", lambda _: said.append("rests"))
    with joined() as ranks:
        Trainer(tiny_config(), Dataset.open(log), ranks, tmp_path, supervision=Supervision())
    assert said == ["watched", "apart", "rests"]


class Peers:
    """Two ranks of which this is one; the other answers what it is told to, or has stopped."""

    def __init__(self, answers: list[int]) -> None:
        self.world_size, self.answers, self.asked = 2, answers, 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        self.asked += 1
        if not self.answers:
            raise RuntimeError("Timed out waiting 60000ms for recv operation to complete")
        return values + self.answers.pop(0)


@pytest.mark.parametrize(("answers", "beats"), [([0, 0, 1], 2), ([0], 1)])
def test_who_waits_for_the_disk_asks_its_peers(tmp_path: Path, answers: list[int], beats: int) -> None:
    """A rank that has written waits for those that have not, and goes on only while they answer."""
    said: list[str] = []
    with joined() as ranks:
        writer = CheckpointWriter(tmp_path, CheckpointConfig(), ranks, lambda: said.append("beat"))
        peers = Peers(answers)
        stops = len(answers) == 1
        writer.ranks = peers  # type: ignore[assignment]
        writer._pending = Future()
        writer._pending.set_result(tmp_path)
        with pytest.raises(RuntimeError, match="Timed out") if stops else nullcontext():
            writer.finish()
    assert said == ["beat"] * beats
    assert peers.asked == beats + 1


def test_a_folder_of_another_run_is_an_error_that_names_what_differs(tmp_path: Path) -> None:
    config = tiny_config()
    with job.member(config, tmp_path):
        pass
    other = replace(config, epochs=config.epochs + 1)
    said = f"another configuration: epochs {config.epochs} there, {config.epochs + 1} here; give the same recipe"
    with pytest.raises(ConfigError, match=said), job.member(other, tmp_path):
        pass
    many = replace(config, epochs=7, seed=7, log_steps=7, bootstrap_resamples=7, timeout_s=7.0)
    with pytest.raises(ConfigError, match="here; and 2 more fields; give"), job.member(many, tmp_path):
        pass
