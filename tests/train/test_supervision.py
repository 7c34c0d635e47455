"""A rank whose launcher is killed: told to leave where that launcher had all ranks, ended where there are others."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import job
from pipeline.data.logs import Dataset
from pipeline.job import membership
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
        assert said == ["joining", "watched", "joined"]


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
