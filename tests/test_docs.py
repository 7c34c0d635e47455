"""Every command of README and docs is one that exists: parsed by the very parsers, dry-run by TorchX.

Those of README's "Step by step" and of the tutorial run for real: see test_readme.py and test_tutorial.py.
"""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torchx.runner import get_runner
from torchx.schedulers import slurm_scheduler

from pipeline.cli import VERBS

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


class ParsedError(Exception):
    """The arguments were understood."""


def test_the_pages_have_commands() -> None:
    assert len(COMMANDS) > 15


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
