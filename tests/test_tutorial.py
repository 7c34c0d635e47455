"""docs/tutorial.md runs as written, block after block, in an empty folder."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import polars as pl
import pytest

from pipeline.cli import main
from pipeline.data.logs import Dataset
from pipeline.evaluate.predictions import read_predictions
from pipeline.serve.artifact import open_artifact

PAGE = Path(__file__).parents[1] / "docs" / "tutorial.md"
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def run_line(line: str) -> None:
    program, *argv = shlex.split(line)
    if program == "python":
        (script,) = argv
        runpy.run_path(script)
    else:
        assert program == "trefoil"
        assert main(argv) == 0, line


def test_the_tutorial_runs_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("TREFOIL_HOME", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    blocks = BLOCK.findall(PAGE.read_text())
    assert [kind for kind, _, _ in blocks].count("sh") == 5
    for kind, title, text in blocks:
        if title:
            Path(title).write_text(text)
        elif kind == "sh":
            for line in text.strip().splitlines():
                run_line(line)
        else:
            assert kind == "python"
            exec(compile(text, str(PAGE), "exec"), {})
    assert Dataset.open("logs").schema.surfaces == ("hf", "sr", "rp")
    assert len(read_predictions("runs/unified/predictions/test.parquet").dates) == 2
    assert open_artifact("artifacts/sr").surface == "sr"
    scores = pl.read_parquet("scores.parquet")
    assert scores["p_buy"].explode().is_between(0, 1).all()
    assert "p_click" in capsys.readouterr().out
