"""The commands on a registry: what they print, and that bad use is one clear error with nothing changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.rollout.plan import write_plan
from pipeline.rollout.registry import Registry
from tests.rollout.models import TAGS, evidence, log_model, promote
from tests.rollout.plans import plan


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Version 1 of hf serves, version 2 waits with evidence; sr's version 1 waits without; a plan for the same log."""
    folder = tmp_path_factory.mktemp("commands")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.delenv("RANK", raising=False)
        address = log_model(folder)
        registry = Registry(folder)
        promote(registry, "hf", address)
        made = registry.register("hf", address, tags=TAGS, challenger=False)
        registry.nominate("hf", made.version, evidence("hf", champion=1))
        registry.register("sr", address, tags=TAGS)
    write_plan(folder / "plan.yaml", plan())
    write_plan(folder / "other.yaml", plan(dataset="feedfeedfeedfeed"))
    return folder


@pytest.fixture
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("TREFOIL_HOME", str(home))
    return Registry(home)


@pytest.mark.parametrize(
    ("argv", "status", "problem"),
    [
        (["promot"], 2, "unknown verb 'promot'; did you mean 'promote'"),
        (["promote", "hff", "--plan", "HOME/plan.yaml"], 1, "unknown surface 'hff'; did you mean 'hf'"),
        (["promote", "rp", "--plan", "HOME/plan.yaml"], 1, "surface 'rp' has no challenger to promote"),
        (["promote", "sr", "--plan", "HOME/plan.yaml"], 1, "has no evidence: the gates have not seen it"),
        (["promote", "hf", "--plan", "HOME/other.yaml"], 1, "is of another data set: 0123456789abcdef, not feedfeed"),
        (["rollback", "hf"], 1, "surface 'hf' has no previous version to go back to"),
        (["history", "hff"], 1, "unknown surface 'hff'; did you mean 'hf'"),
        (["run", "--plan", "HOME/none.yaml", "--data", "HOME", "--wave", "1"], 1, "there is no plan"),
        (["run", "--plan", "HOME/plan.yaml", "--data", "HOME/none", "--wave", "1"], 1, "there is no such data folder"),
        (["run", "--plan", "HOME/plan.yaml", "--data", "HOME", "--wave", "3"], 1, "waves 1 to 2, and 0 for"),
        (["plan", "--recipe", "demo", "--data", "HOME", "--out", "HOME/plan.yaml"], 1, "is not written over"),
    ],
)
def test_bad_use_changes_nothing(
    at_home: Registry,
    home: Path,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    status: int,
    problem: str,
) -> None:
    before = {s: (at_home.aliases(s), at_home.history(s)) for s in at_home.surfaces()}
    assert main(["rollout", *(a.replace("HOME", str(home)) for a in argv)]) == status
    assert problem in capsys.readouterr().err
    assert {s: (at_home.aliases(s), at_home.history(s)) for s in at_home.surfaces()} == before


@pytest.mark.parametrize("verb", [["rollback", "hf"], ["promote", "hf"], ["status"], ["history"]])
def test_a_registry_that_cannot_be_reached_is_one_error(
    at_home: Registry, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: list[str]
) -> None:
    before = at_home.aliases("hf")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert main(["rollout", *verb]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"trefoil rollout: could not {'' if verb != ['status'] else 'list'}")
    assert at_home.aliases("hf") == before


def test_promote_and_rollback_are_told_and_kept(
    at_home: Registry, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rollout", "promote", "hf", "--plan", str(home / "plan.yaml"), "--actor", "ann", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "surface": "hf",
        "aliases": {"champion": 2, "previous": 1},
        "evidence": "r",
    }
    assert main(["rollout", "rollback", "hf", "--actor", "ben", "--reason", "calls"]) == 0
    assert "hf: version 1 is champion again" in capsys.readouterr().out
    assert main(["rollout", "status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["aliases"] == {"hf": {"champion": 1}, "sr": {"challenger": 1}}
    assert main(["rollout", "history", "hf"]) == 0
    told = capsys.readouterr().out
    assert "promote  by ann: champion 2, previous 1; evidence: run r" in told
    assert "rollback by ben: champion 1; calls" in told
    from pipeline.tracking import connect

    client = connect(home)
    experiment = client.get_experiment_by_name("trefoil/rollout")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert sorted((r.data.tags["kind"], r.data.tags["actor"]) for r in runs) == [
        ("promote", "ann"),
        ("rollback", "ben"),
    ]
