"""Ranks that are told to leave, that hang or that die, under torchrun as a user starts them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import DaysConfig
from pipeline.data.simulate import SimulationConfig, simulate
from pipeline.train.checkpoint import newest
from tests.train.runs import parameters, tiny_config
from tests.train.runs import train as train_here

NO_DAYS = DaysConfig(validation=0, test=0)
ROOT = Path(__file__).parents[2]
# A recipe whose steps take long enough to be cut off in the middle, and whose first rank 1 can be told to hang.
RECIPE = """
import os, time
from dataclasses import replace
import pipeline.train.trainer as trainer
from pipeline.config import DaysConfig
from tests.train.runs import tiny_config

real = trainer.Trainer.steps

def slow(self, *args, **kwargs):
    for outputs in real(self, *args, **kwargs):
        done = self.position.step + 1
        time.sleep(float(os.environ.get("STEP_S", "0.2")) if self.model.training else 0)
        if os.environ.get("HANG") and self.ranks.rank == 1 and done == 3:
            time.sleep(1000)
        yield outputs

trainer.Trainer.steps = slow

def run():
    tiny = tiny_config()
    days = DaysConfig(validation=0, test=0)
    return replace(tiny, days=days, checkpoint=replace(tiny.checkpoint, steps=2, keep_newest=3))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("log") / "data"
    simulate(root, SimulationConfig.tiny())
    return root


@contextmanager
def started(command: list[str], folder: Path, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """A process in a group of its own, of which nothing is left afterwards; its output goes to FOLDER/said."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TORCH", "RANK", "WORLD_SIZE"))}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TREFOIL_HOME": str(folder), **variables}
    with (folder / "said").open("a") as said:
        process = subprocess.Popen(
            [sys.executable, *command],
            env=environment,
            cwd=ROOT,
            stdout=said,
            stderr=said,
            text=True,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def train(data: Path, folder: Path, run: str, *more: str) -> list[str]:
    (folder / "recipe.py").write_text(RECIPE)
    flags = ["--recipe", f"{folder / 'recipe.py'}:run", "--data", str(data), "--run-dir", str(folder / run)]
    return ["train", *flags, *more]


def wait(what: Callable[[], object], folder: Path, timeout_s: float = 200) -> None:
    end = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < end, (folder / "said").read_text()[-4000:]
        time.sleep(0.1)


def status(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "status.json").read_text())
    return found


def end_of_one_rank(data: Path, folder: Path) -> dict[str, np.ndarray]:
    """Parameters of an undisturbed run of the same recipe in this process."""
    return parameters(train_here(replace(tiny_config(), days=NO_DAYS), data, folder)["checkpoint"])


def assert_close(path: Path | None, expected: dict[str, np.ndarray]) -> None:
    assert path is not None
    found = parameters(path)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-3, atol=2e-5, err_msg=name)


@pytest.mark.slow
def test_sigterm_saves_after_one_step_on_all_ranks_leaves_with_success_and_goes_on(data: Path, tmp_path: Path) -> None:
    command = ["-m", "pipeline.cli", *train(data, tmp_path, "cut", "--nproc", "2")]
    with started(command, tmp_path) as process:
        wait((tmp_path / "cut/checkpoints/epoch-0-step-00000002").exists, tmp_path)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 0, (tmp_path / "said").read_text()[-4000:]
    assert status(tmp_path / "cut")["state"] == "pre-empted"
    left = newest(tmp_path / "cut/checkpoints")
    assert left is not None
    assert int(left.name[-8:]) >= 2
    with started(command, tmp_path, STEP_S="0") as process:
        assert process.wait(timeout=200) == 0, (tmp_path / "said").read_text()[-4000:]
    assert status(tmp_path / "cut")["state"] == "finished"
    assert f"going on from {left}".replace("\n", "") in (tmp_path / "said").read_text().replace("\n", "")
    # Bit for bit is tests/distributed/test_reshard.py; one rank adds up in another order.
    assert_close(newest(tmp_path / "cut/checkpoints"), end_of_one_rank(data, tmp_path / "straight"))


@pytest.mark.slow
def test_a_rank_that_hangs_is_noticed_and_every_rank_tells_where_it_stood(data: Path, tmp_path: Path) -> None:
    command = ["-m", "pipeline.cli", *train(data, tmp_path, "hung", "--nproc", "2", "--timeout-s", "20")]
    with started(command, tmp_path, HANG="1") as process:
        wait(lambda: list((tmp_path / "hung/checkpoints").glob("epoch-*")), tmp_path)
        # The watch, torchrun's look at its ranks every 0.1 s, and its end.
        assert process.wait(timeout=120) not in (0, None)
    stacks = {int(re.findall(r"rank-(\d)", p.name)[0]): p.read_text() for p in (tmp_path / "hung/stacks").glob("*.txt")}
    assert "time.sleep" in stacks[1] or "in slow" in stacks[1]
    assert all("Timeout" in text for text in stacks.values())
    left = newest(tmp_path / "hung/checkpoints")
    assert left is not None
    with started(command, tmp_path) as process:
        assert process.wait(timeout=200) == 0
    said = (tmp_path / "said").read_text().replace("\n", "")
    assert f"going on from {left}" in said
    assert "a rank hung before; its stacks are in" in said
    assert_close(newest(tmp_path / "hung/checkpoints"), end_of_one_rank(data, tmp_path / "straight"))


@pytest.mark.slow
def test_a_lost_rank_is_made_up_for_and_a_lost_node_is_done_without(data: Path, tmp_path: Path) -> None:
    """Two nodes of one rank, at least one needed: one is lost for good, the other goes on with every sample once."""
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:29877", "--rdzv-id", "elastic"]
    conf = ["--rdzv-conf", "last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=3"]
    launcher = ["-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3"]
    command = [*launcher, *rendezvous, *conf, "-m", "pipeline.cli", *train(data, tmp_path, "elastic")]
    variables = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "STEP_S": "1"}
    with started(command, tmp_path, **variables) as first:
        time.sleep(2)  # the first node holds the rendezvous, so it is the second that is lost
        with started(command, tmp_path, **variables) as second:
            wait((tmp_path / "elastic/checkpoints/epoch-0-step-00000002").exists, tmp_path)
            os.killpg(second.pid, signal.SIGKILL)
        assert first.wait(timeout=280) == 0, (tmp_path / "said").read_text()[-6000:]
    assert status(tmp_path / "elastic")["state"] == "finished"
    assert status(tmp_path / "elastic")["ranks"] == 1
    assert_close(newest(tmp_path / "elastic/checkpoints"), end_of_one_rank(data, tmp_path / "straight"))
