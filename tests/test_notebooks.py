"""Every notebook runs from an empty kernel on runs made from nothing."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "notebooks").glob("*.py"))


def script(name: str) -> Any:
    """A module of scripts/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


def runs(home: Path, *flags: str) -> Path:
    """Tiny runs, as `scripts/notebook_data.py --tiny` makes them, in a process of their own."""
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    command = [sys.executable, str(ROOT / "scripts" / "notebook_data.py"), "--home", str(home), "--tiny", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return home


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs without artifacts and without a rollout."""
    return runs(tmp_path_factory.mktemp("notebooks"), "--no-register", "--no-rollout")


def images(path: Path) -> int:
    """Figures that a notebook shows."""
    cells = nbformat.read(path, as_version=4).cells
    return sum("image/png" in output.get("data", {}) for cell in cells for output in cell.get("outputs", []))


def execute(source: Path, home: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A notebook executed on the runs of `home`."""
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name, value in {"HOME": str(home), "RESAMPLES": "20", "SECONDS": "0.02", "BATCHES": "4"}.items():
        monkeypatch.setenv(f"TREFOIL_{name}", value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    path: Path = script("notebooks").execute(source, folder / "pages")
    return path


# Of serving, the plan alone: there are no artifacts and no gates to show.
FIGURES = {"calibration": 5, "compare_runs": 4, "inside_the_model": 6, "serving": 1}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
@pytest.mark.timeout(900)
def test_a_notebook_runs_from_an_empty_kernel(
    source: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = execute(source, home, tmp_path, monkeypatch)
    assert images(path) == FIGURES[source.stem]
    page = path.with_suffix(".html").read_text()
    assert "<img" in page
    if source.stem == "serving":
        assert "has no artifacts; make them with `trefoil train --register`" in page
        assert "no wave has been through the gates here" in page


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_serving_shows_artifacts_and_gates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = execute(ROOT / "notebooks" / "serving.py", runs(tmp_path / "home"), tmp_path, monkeypatch)
    # Latency, the plan, and the gates' differences; wave 0 costs what the separate models cost, which are the same.
    assert images(path) == 3


def test_a_home_without_runs_is_one_clear_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebooks = script("notebooks")
    monkeypatch.setenv("TREFOIL_HOME", str(tmp_path / "nowhere"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with pytest.raises(notebooks.CellExecutionError, match="there is no MLflow store; set TREFOIL_HOME"):
        notebooks.execute(ROOT / "notebooks" / "compare_runs.py", tmp_path / "pages")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_notebooks_define_nothing_and_say_what_they_are(source: Path) -> None:
    code = ast.parse(source.read_text())
    assert not [n for n in ast.walk(code) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    first, *others = jupytext.read(source).cells
    assert first.cell_type == "markdown"
    assert first.source.startswith("# ")
    # What a notebook reads from the environment stands in its first cell.
    used = {n.value for n in ast.walk(code) if isinstance(n, ast.Constant) and str(n.value).startswith("TREFOIL_")}
    assert {name for name in used if f"`{name}`" not in first.source} == set()
    assert any(cell.cell_type == "code" for cell in others)
