"""The README's commands run as written."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import polars as pl
import pytest

from pipeline.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def commands(heading: str) -> list[str]:
    section = README.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    block = re.search(r"```sh\n(.*?)```", section, re.DOTALL)
    assert block is not None
    return block[1].strip().splitlines()


def test_step_by_step_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("TREFOIL_HOME", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    lines = commands("Step by step")
    assert len(lines) > 5
    for line in lines:
        program, *argv = shlex.split(line)
        assert program == "trefoil"
        assert main(argv) == 0, line
    scores = pl.read_parquet(tmp_path / "scores.parquet")
    assert scores.height > 0
    assert scores["p_click"].explode().is_between(0, 1).all()


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z]+)", README))
    assert named <= targets


def test_linked_files_exist() -> None:
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / link).exists(), link
    for path in re.findall(r"`((?:components|pipeline|tests|benchmarks|docs|requirements)/[\w/.]*)`", README):
        assert (ROOT / path).exists(), path
