"""TorchX on a real Slurm: two nodes, logs, status, cancel, a node that dies, a job that is requeued and goes on.

Run by `make slurm`, as root: tests/slurm/cluster.sh installs Debian's Slurm and starts it on loopback.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import polars as pl
import pytest
import torch
from safetensors.torch import load_file
from torchx.runner import get_runner

from pipeline.data.simulate import SimulationConfig, simulate

ROOT = Path(__file__).parents[2]
CLUSTER = Path(__file__).parent / "cluster.sh"
SECOND = "trefoil-n2"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(
        shutil.which("slurmctld") is None or os.geteuid() != 0,
        reason="needs root and Slurm's daemons: make slurm installs and starts them",
    ),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of a running cluster."""
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run([CLUSTER, "start", folder], check=True)
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    try:
        yield folder
    finally:
        subprocess.run([CLUSTER, "stop", folder], check=False)
        if before is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = before


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "log"
    simulate(folder, SimulationConfig(requests=1500, users=100, items=100, days=6))
    return folder


@pytest.fixture(autouse=True)
def folder_of_job_dirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TorchX notes the folders of its Slurm jobs in the current folder."""
    monkeypatch.chdir(tmp_path)


def submit(folder: Path, log: Path, run_dir: Path, *overrides: str) -> str:
    """Hand a two-node training job to Slurm; its handle. Nothing is copied: both nodes have this machine's files."""
    arguments = [
        *("--recipe", "demo", "--data", str(log), "--run_dir", str(run_dir), "-j", "2x1", "--python", sys.executable),
        *("--max_retries", "3", "--", "--epochs", "2", "--checkpoint.steps", "3", *overrides),
    ]
    with get_runner() as runner:
        return str(
            runner.run_component(
                f"{ROOT / 'torchx_specs' / 'train.py'}:train",
                arguments,
                scheduler="slurm",
                cfg={"partition": "test", "job_dir": str(folder)},
            )
        )


def torchx(*arguments: str) -> str:
    """What `torchx ARGUMENTS` prints."""
    done = subprocess.run(
        [Path(sys.executable).with_name("torchx"), *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def job(handle: str) -> dict[str, str]:
    """What the controller knows of the first node's half of a job."""
    number = handle.rpartition("/")[2]
    text = subprocess.run(
        ["scontrol", "--oneliner", "show", "job", number], capture_output=True, text=True, check=True
    ).stdout.splitlines()[0]
    return dict(word.split("=", 1) for word in text.split() if "=" in word)


def wait(what: str, done: Callable[[], bool], logs: Path, seconds: float = 400) -> None:
    end = time.monotonic() + seconds
    while not done():
        said = "".join(f"== {p.name}\n{p.read_text()[-3000:]}\n" for p in sorted(logs.glob("slurm-*")))
        assert time.monotonic() < end, f"not in {seconds} s: {what}\n{said}"
        time.sleep(0.5)


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run's last checkpoint by rank and name, moments of optimizers included."""
    files = sorted((run_dir / "checkpoints" / "epoch-2-step-00000000").glob("rank-*.safetensors"))
    assert [file.stem for file in files] == ["rank-0", "rank-1"]
    return {f"{file.stem} {name}": tensor for file in files for name, tensor in load_file(file).items()}


def test_a_job_whose_node_dies_is_requeued_and_ends_as_if_nothing_had_happened(
    slurm: Path, log: Path, tmp_path: Path
) -> None:
    quiet, struck = tmp_path / "quiet", tmp_path / "struck"
    handle = submit(tmp_path / "job-quiet", log, quiet)
    wait("the undisturbed job runs", lambda: job(handle)["JobState"] == "RUNNING", tmp_path / "job-quiet")
    assert "State: RUNNING" in torchx("status", handle)
    wait("the undisturbed job ends", lambda: job(handle)["JobState"] == "COMPLETED", tmp_path / "job-quiet")

    handle = submit(tmp_path / "job-struck", log, struck)
    first = struck / "checkpoints" / "epoch-0-step-00000003"
    wait("the first checkpoint", first.exists, tmp_path / "job-struck")
    subprocess.run([CLUSTER, "kill", slurm, SECOND], check=True)
    wait("the job is requeued", lambda: job(handle).get("Restarts", "0") != "0", tmp_path / "job-struck")
    assert not (struck / "checkpoints" / "epoch-2-step-00000000").exists(), "the node died too late for this test"
    subprocess.run([CLUSTER, "node", slurm, SECOND], check=True)
    wait("the requeued job ends", lambda: job(handle)["JobState"] == "COMPLETED", tmp_path / "job-struck")

    expected, found = tensors(quiet), tensors(struck)
    assert found.keys() == expected.keys()
    assert len(expected) > 20
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    for days in ("val", "test"):
        file = f"predictions/{days}.parquet"
        assert pl.read_parquet(struck / file).equals(pl.read_parquet(quiet / file))


def test_cancel_ends_both_nodes(slurm: Path, log: Path, tmp_path: Path) -> None:
    handle = submit(tmp_path / "job", log, tmp_path / "run", "--epochs", "50")
    wait("a checkpoint", (tmp_path / "run/checkpoints/epoch-0-step-00000003").exists, tmp_path / "job")
    # srun hands on what a rank prints when it pleases; the first rank is on whichever node came first.
    # Replicas by number: with Slurm 22.05 on a busy machine TorchX has been seen to count two more, which never write.
    said = ("log", "--streams", "stdout", f"{handle}/train/0,1")
    wait(
        "the rank's output",
        lambda: re.search(r"train/[01] recipe demo: 2 rank\(s\)", torchx(*said)) is not None,
        tmp_path / "job",
    )
    torchx("cancel", handle)
    wait("the job is cancelled", lambda: job(handle)["JobState"] == "CANCELLED", tmp_path / "job")
    idle = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
    wait(
        "both nodes are free",
        lambda: subprocess.run(idle, capture_output=True, text=True, check=True).stdout.strip() == "2",
        tmp_path / "job",
    )
