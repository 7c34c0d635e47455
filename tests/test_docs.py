"""Every command of README and docs is one that exists: parsed by the very parsers, dry-run by TorchX.

Those of README's "Step by step" and of the tutorial run for real: see test_readme.py and test_tutorial.py. Those of the
other pages run for real in a slow test, numbers made small; what is left out says why.
"""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torchx.runner import get_runner
from torchx.schedulers import slurm_scheduler

from pipeline.cli import VERBS, main

ROOT = Path(__file__).parents[1]
# The tutorial's commands want the files that its own blocks make.
TUTORIAL = ROOT / "docs" / "tutorial.md"
DOCS = sorted(set((ROOT / "docs").rglob("*.md")) - {TUTORIAL})
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]


def commands() -> list[tuple[str, str]]:
    """(page, command) for each line of each sh block, continued lines joined, comments and assignments left out."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words.pop(0)
                if words:
                    found.append((page.name, shlex.join(words)))
    return list(dict.fromkeys(found))


COMMANDS = commands()
KINDS = ("trefoil ", "make ", "torchx run ", "python -m benchmarks.")
# Commands of other programs, and what stands for them.
OTHERS = {
    "podman build": "wants podman and the network; the Containerfile's steps are `make setup`'s",
    "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "a variable for the line below it",
    "torchrun ": "wants two hosts; tests/torchx/test_restarts.py and tests/slurm run the same launcher",
    "torchx tracker list": "tests/torchx/test_tracker.py runs it on jobs of its own",
    "mlflow models serve": "tests/serve/test_mlflow_http.py runs it",
}
# Trefoil's commands that the slow test below does not run, and what runs them.
NOT_RUN = {
    "trefoil ingest kuairand": "the files are not ours to ship; tests/data/test_ingest_kuairand.py makes such files",
    "trefoil rollout": "wants hours of story: `make rollout`, tests/rollout/test_commands.py",
    "trefoil plan --recipe ten_terabytes": "tests/train/test_cluster.py",
}
# Numbers that would take hours, names that the reader is to fill in.
SMALLER = {
    "--trials 20": "--trials 2 --folds 1",
    "--nproc 8": "--nproc 2",
    "--nodes 8": "--nodes 1",
    "--out cost.json": "--out cost.json --seconds 0.02 --requests 1 --candidates 1 16",
    "CHECKPOINT": "runs/RUN/checkpoints/epoch-1-step-00000000",
    "NEWER": "runs/OTHER/checkpoints/epoch-1-step-00000000",
}


class ParsedError(Exception):
    """The arguments were understood."""


def test_the_pages_have_commands_of_kinds_that_are_tested() -> None:
    assert len(COMMANDS) > 15
    assert [c for _, c in COMMANDS if not c.startswith((*KINDS, *OTHERS))] == []
    for prefix in (*OTHERS, *NOT_RUN):
        assert any(c.startswith(prefix) for _, c in COMMANDS), f"no page has {prefix} any more"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_commands_of_the_pages_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("TREFOIL_HOME", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    Path("my_recipes.py").write_text("from pipeline.recipes.demo import demo as wide\n")
    Path("space.yaml").write_text("metric: click/log_loss\nfields:\n  model.deep: {choices: [[16], [32]]}\n")
    assert main(["simulate", "--out", "logs", "--requests", "1500", "--users", "150", "--items", "100"]) == 0
    train = ["train", "--recipe", "demo", "--data", "logs", "--epochs", "1"]
    for i, name in enumerate(("RUN", "OTHER")):
        assert main([*train, "--run-dir", f"runs/{name}", "--seed", str(i)]) == 0
    for surface in ("hf", "sr", "rp"):
        checkpoint = "runs/RUN/checkpoints/epoch-1-step-00000000"
        export = ["export", "--checkpoint", checkpoint, "--data", "logs", "--out", surface, "--max-requests", "64"]
        assert main([*export, "--surface", surface]) == 0
    part = next(Path("logs/surface=hf").rglob("*.parquet"))
    Path("rows.parquet").write_bytes(part.read_bytes())
    ran = 0
    for page, command in COMMANDS:
        if page == "README.md" or not command.startswith("trefoil ") or command.startswith(tuple(NOT_RUN)):
            continue
        for written, smaller in SMALLER.items():
            command = command.replace(written, smaller)
        argv = shlex.split(command)[1:]
        if "--out" in argv and argv[0] in ("simulate", "export"):  # what the page makes first is there already
            shutil.rmtree(argv[argv.index("--out") + 1], ignore_errors=True)
        if argv[0] == "simulate":
            argv += ["--requests", "1500", "--users", "150", "--items", "100"]
        assert main(argv) == 0, command
        ran += 1
    assert ran > 12


@pytest.mark.parametrize("command", [c for _, c in COMMANDS if c.startswith("trefoil ")])
def test_a_trefoil_command_parses(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_recipes.py").write_text("from pipeline.recipes.demo import demo as wide\n")
    _, verb, *argv = shlex.split(command)
    assert verb in VERBS
    # Verbs of the rollout are modules of their own.
    name = f"{verb}_{argv.pop(0)}" if verb == "rollout" else verb
    module: Any = importlib.import_module(f"pipeline.cli.{name}")
    original: Callable[..., Any] = module.parse

    def parse_only(*args: Any, **kwargs: Any) -> Any:
        original(*args, **kwargs)
        raise ParsedError

    monkeypatch.setattr(module, "parse", parse_only)
    with pytest.raises(ParsedError):
        module.main(argv)


@pytest.mark.parametrize("command", [c for _, c in COMMANDS if re.match(r"python -m benchmarks\.", c)])
def test_a_benchmark_exists_and_has_the_flags(command: str) -> None:
    _, _, module, *argv = shlex.split(command)
    source = ROOT / (module.replace(".", "/") + ".py")
    nodes = [n for f in (source, ROOT / "benchmarks" / "common.py") for n in ast.walk(ast.parse(f.read_text()))]
    # argparse's flags are texts, tyro's are fields.
    known = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    known |= {
        "--" + n.target.id.replace("_", "-")
        for n in nodes
        if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
    }
    for flag in (word for word in argv if word.startswith("--")):
        assert flag in known, f"{source.name} has no {flag}"


@pytest.mark.parametrize("command", [c for _, c in COMMANDS if c.startswith("make ")])
def test_a_make_target_exists(command: str) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {word for word in shlex.split(command)[1:] if "=" not in word and not word.startswith("-")} <= targets


# TorchX says of every retried job that some releases of Volcano do not retry.
@pytest.mark.filterwarnings(r"ignore:[\s\S]*Volcano:UserWarning")
@pytest.mark.parametrize("command", [c for _, c in COMMANDS if c.startswith("torchx run ")])
def test_a_torchx_job_can_be_dry_run(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(slurm_scheduler, "version", lambda: (24, 11))
    words = shlex.split(command)
    scheduler = words[words.index("--scheduler") + 1]
    place = next(i for i, word in enumerate(words) if word.startswith("torchx_specs/"))
    given = words[words.index("-cfg") + 1].split(",") if "-cfg" in words else []
    options: dict[str, Any] = {n: {"False": False}.get(v, v) for n, _, v in (item.partition("=") for item in given)}
    with get_runner() as runner:
        request = runner.dryrun_component(words[place], words[place + 1 :], scheduler=scheduler, cfg=options)
    assert "pipeline.cli" in str(request)
