"""What the TorchX components ask of each scheduler, against golden files, and their command line.

`UPDATE_GOLDEN=1 pytest tests/torchx` writes the golden files anew; read the difference before committing it.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from torchx.cli.main import main as torchx
from torchx.runner import get_runner
from torchx.schedulers import kubernetes_scheduler, local_scheduler, slurm_scheduler
from torchx.specs import AppDef
from torchx.specs.finder import get_components

from torchx_specs.evaluate import evaluate
from torchx_specs.export import export
from torchx_specs.ingest import ingest
from torchx_specs.launch import ArgumentError, app_name
from torchx_specs.train import train

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).parents[2]
OURS = ("train", "evaluate", "export", "ingest", "sweep", "rollout")
CONFIG: dict[str, dict[str, str | bool]] = {
    "local_cwd": {"log_dir": "logs"},
    "slurm": {"partition": "gpu"},
    "kubernetes": {"queue": "ads", "validate_spec": False},
}
TWO_NODES = ["-j", "2x8", "-h", "h100x8", "--max_restarts", "3", "--max_retries", "2"]
JOBS: dict[str, tuple[str, list[str]]] = {
    "train_one_node": ("train", ["--recipe", "demo", "--data", "logs", "--nproc", "2", "--", "--epochs", "2"]),
    "train_two_nodes": (
        "train",
        [
            *("--recipe", "recipes.py:wide", "--data", "/logs", "--run_dir", "/runs/a b", *TWO_NODES),
            *("--env", "MLFLOW_TRACKING_URI=http://mlflow:5000", "--mounts", "type=volume,src=logs,dst=/logs,readonly"),
        ],
    ),
    "sweep": (
        "sweep",
        [
            *("--recipe", "demo", "--data", "/logs", "--space", "space.yaml", "--study", "/runs/sweeps/rates"),
            *("--trials", "20", "--workers", "2", "--", "--folds", "2"),
        ],
    ),
    "ingest": (
        "ingest",
        ["--spec", "kuairand", "--out", "/logs", "--workers", "4", "-h", "cpu8", "--", "root=/raw", "--jobs", "8"],
    ),
    "evaluate": ("evaluate", ["--checkpoint", "runs/a/checkpoints/9", "--data", "logs"]),
    "rollout": ("rollout", ["--plan", "plan.yaml", "--data", "/logs", "--wave", "1", "--", "--promote"]),
    "export": ("export", ["--checkpoint", "runs/a/checkpoints/9", "--surface", "hf", "--out", "artifacts/hf"]),
}


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No Slurm to ask, jobs of steady names, and signal handlers as they were."""
    monkeypatch.chdir(ROOT)
    for module in (local_scheduler, kubernetes_scheduler):
        monkeypatch.setattr(module, "make_unique", lambda name: f"{name}-ID")
    monkeypatch.setattr(slurm_scheduler, "version", lambda: (24, 11))
    monkeypatch.setattr(slurm_scheduler.SlurmScheduler, "_partition_memmb", lambda self, partition: None)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def steady(text: str) -> str:
    """The request less what differs from one dry run, machine or release of TorchX to the next."""
    text = text.replace(str(ROOT), "ROOT")
    text = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "SESSION", text)
    return re.sub(r"\b20\d\d\.\d+\.\d+(\.dev\d+)?\b", "VERSION", text)


def dry_run(component: str, arguments: list[str], scheduler: str) -> str:
    with get_runner() as runner:
        info = runner.dryrun_component(component, arguments, scheduler, cfg=CONFIG[scheduler])
        # Printed prettily, lines of the local request break where the length of this folder's name has them break.
        text = json.dumps(asdict(info.request), indent=1) if scheduler == "local_cwd" else str(info)
        return steady(text).rstrip() + "\n"


# TorchX says of every retried job that some releases of Volcano do not retry.
@pytest.mark.filterwarnings(r"ignore:[\s\S]*Volcano:UserWarning")
@pytest.mark.parametrize("scheduler", CONFIG)
@pytest.mark.parametrize("job", JOBS)
def test_dry_run_is_the_golden_one(job: str, scheduler: str) -> None:
    component, arguments = JOBS[job]
    request = dry_run(component, arguments, scheduler)
    golden = GOLDEN / f"{job}.{scheduler}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(request)
    assert request == golden.read_text(), f"{golden.name} differs; UPDATE_GOLDEN=1 writes it anew"


def test_paths_and_names_address_the_same_components() -> None:
    registered = dry_run("train", JOBS["train_one_node"][1], "slurm")
    by_file = dry_run("torchx_specs/train.py:train", JOBS["train_one_node"][1], "slurm")
    by_module = dry_run("torchx_specs.train:train", JOBS["train_one_node"][1], "slurm")
    assert registered == by_file == by_module


def test_ours_are_registered_beside_torchx_own() -> None:
    names = get_components()
    assert {*OURS, "dist.torchrun", "utils.echo"} <= names.keys()


@pytest.mark.parametrize("name", OURS)
def test_help_says_what_and_how(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        torchx(["run", "--scheduler", "local_cwd", name, "--help"])
    assert exit_info.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"torchx run --scheduler local_cwd {name} --" in text
    assert "TIP:" not in text


@pytest.mark.parametrize("name", OURS)
def test_the_example_in_the_help_works(name: str) -> None:
    description = get_components()[name].description
    example = next(line for line in description.splitlines() if line.startswith("For example: "))
    _, _, arguments = example.partition(f" {name} ")
    assert f"pipeline.cli {name} " in dry_run(name, arguments.split(), "slurm").replace("' '", " ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"j": "2by8"}, r"-j is '2by8'; write NODESxPROCESSES, for example -j 2x8"),
        ({"j": "0x8"}, r"-j is '0x8'"),
        ({"j": "3:2x8"}, r"-j 3:2x8 asks for at least 3 of 2 nodes"),
        ({"j": "1x2", "nproc": 2}, r"-j 1x2 and --nproc 2 are both given"),
        ({"nproc": -1}, r"--nproc is -1; it must be positive"),
        ({"nproc": 9, "h": "h100x8"}, r"9 processes on a node of 8 GPUs"),
        ({"h": "h100"}, r"`h100`. Did you mean `h100x8`"),
        ({"max_restarts": -1}, r"--max_restarts is -1; it must be at least 0, for example --max_restarts 3"),
    ],
)
def test_a_wrong_argument_is_named_with_a_right_one(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        train(recipe="demo", data="logs", **arguments)  # type: ignore[arg-type]


def test_the_command_line_prints_a_wrong_argument_without_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_info:
        torchx(["run", "--dryrun", "-s", "local_cwd", "train", "--recipe", "demo", "--data", "logs", "-j", "8"])
    assert exit_info.value.code == 1
    assert "-j is '8'; write NODESxPROCESSES" in caplog.text


def test_a_node_of_gpus_gets_a_process_for_each() -> None:
    assert "--nproc-per-node 8 " in shell(train(recipe="demo", data="logs", h="a100x8"))
    assert "--nproc-per-node 1 " in shell(train(recipe="demo", data="logs"))


def test_a_range_of_nodes_goes_on_with_the_fewest() -> None:
    app = train(recipe="demo", data="logs", j="2:4x8", max_restarts=3)
    assert "--nnodes 2:4 --nproc-per-node 8 --max-restarts 3 " in shell(app)
    assert (app.roles[0].min_replicas, app.roles[0].num_replicas) == (2, 4)


def test_arguments_reach_the_job_unbroken() -> None:
    app = train("--name", "it's $HOME", recipe="a b.py:f", data="logs", run_dir="r", register=True)
    assert shell(app).endswith(
        "-m pipeline.cli train --recipe 'a b.py:f' --data logs --run-dir r --register --name 'it'\"'\"'s $HOME'"
    )


def test_one_process_jobs_call_the_verb() -> None:
    env = {"A": "b"}
    app = evaluate("--json", checkpoint="c", data="logs", env=env)
    assert app.roles[0].args == ["-m", "pipeline.cli", "evaluate", "--checkpoint", "c", "--data", "logs", "--json"]
    # What a job prints goes to a file, even where its scheduler makes a terminal of it.
    assert app.roles[0].env == {"TTY_COMPATIBLE": "0", "A": "b"}
    assert env == {"A": "b"}
    assert ingest("root=x", spec="kuairand", out="o").roles[0].args[2:] == [
        "ingest",
        "kuairand",
        "--out",
        "o",
        "root=x",
    ]
    assert export(checkpoint="c", surface="hf", out="o", python="py").roles[0].entrypoint == "py"


@pytest.mark.parametrize("what", ["demo", "a/b.py:Wide_Tower", "/logs/2026-01-01/", "x" * 80, "___"])
def test_names_are_good_for_every_scheduler(what: str) -> None:
    assert re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", app_name("train", what))


def test_resources_are_registered_and_whole() -> None:
    registered = {e.name: e.load()() for e in entry_points(group="torchx.named_resources") if e.module == OUR_RESOURCES}
    assert {name: (r.cpu > 0, r.gpu, r.memMB > 0) for name, r in registered.items()} == {
        "cpu8": (True, 0, True),
        "a100x8": (True, 8, True),
        "h100x8": (True, 8, True),
        "h200x8": (True, 8, True),
    }


OUR_RESOURCES = "torchx_specs.resources"


def shell(app: AppDef) -> str:
    """The one line that the shell of a rank's role runs."""
    flag, line = app.roles[0].args
    assert (app.roles[0].entrypoint, flag) == ("bash", "-c")
    return line
