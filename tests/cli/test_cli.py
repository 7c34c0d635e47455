"""The command line: help is instant, wrong use is one clear sentence, status 2 or 1."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import job
from pipeline.cli import VERBS, main
from pipeline.data.simulate import SimulationConfig, simulate
from pipeline.serve.bound import DEFAULT_BUDGET, Budget

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "mlflow", "polars", "pyarrow", "numpy", "pandas")


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("log") / "data"
    simulate(root, SimulationConfig.tiny())
    return root


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from pipeline.cli import main; main(['--help']); "
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert all(f"  {verb} " in done.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    assert f"trefoil {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["trian"], 2, "unknown verb 'trian'; did you mean 'train'"),
        (["train", "--data", "x"], 1, "give --recipe NAME. Shipped: demo"),
        (["train", "--recipe", "demo"], 1, "give --data DIR"),
        (["train", "--recipe", "dmo", "--data", "x"], 1, "unknown recipe 'dmo'; did you mean 'demo'"),
        (["train", "--recipe", "demo", "--data", "nowhere"], 1, "there is no such data folder"),
        (["train", "--recipe", "demo", "--data", "LOG", "--nproc", "0"], 1, "--nproc is 0"),
        (["train", "--recipe", "demo", "--data", "LOG", "--surfaces", "hf", "srr"], 1, "did you mean 'sr'"),
        (["train", "--recipe", "demo", "--data", "LOG", "--days.last", "2025-01-01"], 1, "unknown day '2025-01-01'"),
        (["train", "--recipe", "demo", "--data", "LOG", "--epochs", "0"], 1, "epochs is 0"),
        (["ingest", "kuairand", "--out", "OUT", "root"], 1, "is not written name=value"),
        (["simulate", "--out", "LOG"], 1, "already holds a log"),
    ],
)
def test_wrong_use_is_one_clear_sentence(
    argv: list[str],
    status: int,
    message: str,
    log: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = [{"LOG": str(log), "OUT": str(tmp_path / "out")}.get(a, a) for a in argv]
    assert main(argv) == status
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--recipe", "demo", "--data", "x", "--epoch", "1"], "--epochs"),
        (["train", "--recipe", "demo", "--data", "x", "--seed", "one"], "one"),
        (["simulate", "--out", "x", "--request", "1"], "--requests"),
    ],
)
def test_unknown_flags_and_unusable_values_name_the_nearest(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_recipes_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--json"]) == 0
    assert "kuairand" in json.loads(capsys.readouterr().out)


def test_completion_knows_every_verb_and_its_flags() -> None:
    # What a shell would offer, asked of a real one.
    ask = """
eval "$(trefoil completion bash)"
offer() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _trefoil; echo "${COMPREPLY[*]}"; }
trefoil() { python -m pipeline.cli "$@"; }
offer trefoil tr
offer trefoil train --loader.his
offer trefoil compare --j
"""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    ask = ask.replace("trefoil completion", "python -m pipeline.cli completion")
    done = subprocess.run(["bash", "-c", ask], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["train", "--loader.history-length", "--json"]


def test_a_reader_that_has_read_enough_gets_no_traceback() -> None:
    command = f"{sys.executable} -m pipeline.cli train --recipe demo --data x --help | head -n 1"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: trefoil train")
    assert done.stderr == ""


def test_train_registers_within_the_budget_it_is_given(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow machine needs more than the default, and a run that took days must not fail for it."""
    asked: list[Budget] = []
    result = job.JobResult(folder=tmp_path, checkpoint=tmp_path, stopped=False, comparison=None, run_key=None)
    monkeypatch.setattr(job, "run", lambda *_, **__: result)
    monkeypatch.setattr(job, "register", lambda *_, budget, **__: asked.append(budget))
    argv = ["train", "--recipe", "demo", "--data", str(log), "--run-dir", str(tmp_path), "--quiet"]
    assert main([*argv, "--register", "--latency-ms", "400", "--memory-mb", "512"]) == 0
    assert main([*argv, "--register"]) == 0
    assert asked == [Budget(latency_ms=400, memory_mb=512), DEFAULT_BUDGET]
