"""The registry: the way of a version, what is refused, errors in mid-change, and the audit records."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import RegistryError
from pipeline.rollout import audit, changes
from pipeline.rollout.registry import Registry
from tests.rollout.crashes import each_call
from tests.rollout.models import TAGS, evidence, promote


@pytest.fixture
def registry(root: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Registry(root)


def test_a_version_goes_the_whole_way(registry: Registry, model_uri: str) -> None:
    first = registry.register("hf", model_uri, tags=TAGS, challenger=False)
    assert (first.surface, first.tags) == ("hf", TAGS)
    assert f"runs:/{first.run_id}/model" == model_uri
    assert (Path(first.source) / "MLmodel").exists()
    assert registry.aliases("hf") == {}
    registry.nominate("hf", first.version, evidence("hf"), actor="ann")
    registry.promote("hf", actor="ben", reason="go")
    assert registry.aliases("hf") == {"champion": first.version}
    second = promote(registry, "hf", model_uri)
    assert registry.aliases("hf") == {"champion": second.version, "previous": first.version}
    assert registry.rollback("hf", reason="canary").version == first.version
    assert registry.aliases("hf") == {"champion": first.version}
    with pytest.raises(RegistryError, match="no previous version"):
        registry.rollback("hf")


def test_the_history_says_who_when_and_on_which_evidence(registry: Registry, model_uri: str) -> None:
    promote(registry, "told", model_uri)
    promote(registry, "told", model_uri)
    registry.rollback("told", actor="ben", reason="calibration")
    history = registry.history("told")
    assert [r.action for r in history] == ["nominate", "promote", "nominate", "promote", "rollback"]
    assert history[0].actor == audit.begin("promote", "x", {}, {}, actor=None, evidence=None, reason="").actor
    assert history[1].evidence == evidence("told")
    assert history[3].evidence == evidence("told", champion=1)
    assert (history[4].actor, history[4].reason, history[4].outcome) == ("ben", "calibration", "done")
    assert [r.time for r in history] == sorted(r.time for r in history)
    for earlier, later in zip(history, history[1:]):  # noqa: B905, RUF007  # a record begins where the last one ended
        assert earlier.after == later.before
    assert history[-1].after == registry.aliases("told")


def test_a_challenger_can_be_withdrawn(registry: Registry, model_uri: str) -> None:
    champion = promote(registry, "shy", model_uri)
    registry.register("shy", model_uri)
    registry.withdraw("shy")
    assert registry.aliases("shy") == {"champion": champion.version}
    with pytest.raises(RegistryError, match="no challenger to withdraw"):
        registry.withdraw("shy")


def test_surfaces_do_not_touch_each_other(registry: Registry, model_uri: str) -> None:
    registry.register("sr", model_uri)
    before, history = registry.aliases("sr"), registry.history("sr")
    promote(registry, "rp", model_uri)
    assert (registry.aliases("sr"), registry.history("sr")) == (before, history)
    assert {"rp", "sr"} <= set(registry.surfaces())


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"passed": False}, "did not pass its gates"),
        ({"dataset": "f" * 16}, "is of another data set: ffffffffffffffff, not 0123456789abcdef"),
        ({"artifact": "e" * 64}, "is of another artifact"),
        ({"surface": "hf"}, "is of another surface"),
        ({"champion": 7}, "compares it with champion 7, and none serves now"),
    ],
)
def test_evidence_that_is_not_of_this(
    registry: Registry, model_uri: str, changed: dict[str, Any], problem: str
) -> None:
    made = registry.register("strict", model_uri, tags=TAGS, challenger=False)
    before = registry.history("strict")
    with pytest.raises(RegistryError, match=problem):
        registry.nominate("strict", made.version, replace(evidence("strict"), **changed))
    assert (registry.aliases("strict"), registry.history("strict")) == ({}, before)


def test_no_promotion_without_evidence_or_on_another_log(registry: Registry, model_uri: str) -> None:
    made = registry.register("bare", model_uri, tags=TAGS)
    with pytest.raises(RegistryError, match="has no evidence: the gates have not seen it"):
        registry.promote("bare")
    registry.nominate("bare", made.version, evidence("bare"))
    with pytest.raises(RegistryError, match="another data set: 0123456789abcdef, not feed"):
        registry.promote("bare", dataset="feed")
    assert registry.aliases("bare") == {"challenger": made.version}
    registry.promote("bare", dataset=TAGS["dataset"])


def test_evidence_is_stale_once_another_serves(registry: Registry, model_uri: str) -> None:
    late = registry.register("race", model_uri, tags=TAGS, challenger=False)
    registry.nominate("race", late.version, evidence("race"))
    other = registry.register("race", model_uri, tags=TAGS, challenger=False)
    registry.nominate("race", other.version, evidence("race"))
    registry.promote("race")
    with pytest.raises(RegistryError, match=f"with champion none, and {other.version} serves now"):
        registry.nominate("race", late.version, evidence("race"))


@pytest.mark.parametrize(
    "address", ["runs:/0123456789abcdef0123456789abcdef/model", "file:///tmp/model", "models:/m-0"]
)
def test_no_model_no_version(registry: Registry, address: str) -> None:
    with pytest.raises(RegistryError, match=r"could not register|no model's address"):
        registry.register("empty", address)
    assert registry.aliases("empty") == {}


def test_a_run_without_the_model_is_named(registry: Registry, model_uri: str) -> None:
    with pytest.raises(RegistryError, match="no MLmodel file"):
        registry.register("empty", model_uri + "s")


def test_names_are_checked(registry: Registry) -> None:
    with pytest.raises(RegistryError, match="no challenger"):
        registry.promote("never")
    with pytest.raises(RegistryError, match="did you mean 'champion'"):
        registry.get("hf", "champoin")


@pytest.mark.parametrize("failing", [1, 2, 3, 4, 5])
def test_a_promotion_that_fails_midway_is_undone(
    registry: Registry, model_uri: str, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """Whichever write fails, before or after it took effect, neither aliases nor history have changed."""
    surface = f"frail{failing}"
    promote(registry, surface, model_uri)
    made = registry.register(surface, model_uri, tags=TAGS, challenger=False)
    registry.nominate(surface, made.version, evidence(surface, champion=1))
    before = (registry.aliases(surface), registry.history(surface))
    calls = 0

    def fails(real: Any) -> Any:
        def call(*args: Any) -> None:
            nonlocal calls
            calls += 1
            real(*args)
            if calls == failing:
                raise OSError("the line went dead")

        return call

    each_call(registry, surface, fails, monkeypatch.setattr)
    with pytest.raises(RegistryError, match=r"could not promote.*went dead"):
        registry.promote(surface)
    assert (registry.aliases(surface), registry.history(surface)) == before
    assert registry.recover(surface) is None


def test_an_intent_of_another_machine_is_respected_while_it_is_fresh(
    registry: Registry, model_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    champion = promote(registry, "far", model_uri)
    promote(registry, "far", model_uri)
    now = registry.aliases("far")
    record = json.loads(audit.dump(audit.begin("rollback", "far", now, {}, actor="eve", evidence=None, reason="")))
    registry._client.set_registered_model_tag(  # type: ignore[union-attr]
        "trefoil-far", audit.INTENT, json.dumps(record | {"host": "elsewhere"})
    )
    with pytest.raises(RegistryError, match="eve on elsewhere began to rollback surface 'far'"):
        registry.rollback("far")
    assert registry.aliases("far") == now
    monkeypatch.setattr(changes, "_OTHER_MACHINE_S", 0.0)
    assert registry.rollback("far").version == champion.version
    assert [r.outcome for r in registry.history("far")][-2:] == ["undone by recovery", "done"]


def test_who_waits_for_the_lock_gives_up_with_nothing_changed(
    registry: Registry, model_uri: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(registry, "busy", model_uri)
    promote(registry, "busy", model_uri)
    before = registry.aliases("busy")
    monkeypatch.setattr("pipeline.rollout.registry._LOCK_PATIENCE_S", 0.1)
    from pipeline.rollout.registry import _locked

    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        with _locked(root / ".registry-busy.lock", "busy"):
            held.set()
            go.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(30)
    try:
        with pytest.raises(RegistryError, match="nothing was changed, try again"):
            registry.rollback("busy")
    finally:
        go.set()
        thread.join()
    assert registry.aliases("busy") == before


def test_a_store_that_is_away_is_one_clear_error(tmp_path: Path) -> None:
    away = Registry(tmp_path, uri="http://127.0.0.1:1")
    for ask in (
        lambda: away.get("hf", "champion"),
        lambda: away.promote("hf"),
        lambda: away.rollback("hf"),
        lambda: away.history("hf"),
    ):
        with pytest.raises(RegistryError, match="could not"):
            ask()
