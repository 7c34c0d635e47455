"""Processes that are killed between any two writes, and processes that act at the same time."""

from __future__ import annotations

import multiprocessing
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pipeline.rollout.registry import Registry
from tests.rollout.crashes import act, die
from tests.rollout.models import TAGS, evidence, promote

# Writes of a change: its intent, its aliases (previous, champion, what is freed), its record, the intent's end.
WRITES = {"promote": 6, "rollback": 5}
# The write that moves the champion: before it a change is undone, after it it is finished.
MOVES_CHAMPION = {"promote": 3, "rollback": 2}


@pytest.fixture(scope="module")
def processes() -> Any:
    """Starts processes that have MLflow imported and nothing open."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mlflow", "mlflow.store.model_registry.sqlalchemy_store", "tests.rollout.crashes"])
    return context


@pytest.mark.parametrize(
    ("action", "writes"), [(action, n) for action, count in WRITES.items() for n in range(count + 1)]
)
def test_killed_between_two_writes(
    root: Path, model_uri: str, processes: Any, monkeypatch: pytest.MonkeyPatch, action: str, writes: int
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    surface, registry = f"{action}{writes}", Registry(root)
    promote(registry, surface, model_uri)
    promote(registry, surface, model_uri)
    made = registry.register(surface, model_uri, tags=TAGS, challenger=False)
    registry.nominate(surface, made.version, evidence(surface, champion=2))
    before = registry.aliases(surface)
    assert before == {"champion": 2, "previous": 1, "challenger": 3}
    after = {
        "promote": {"champion": 3, "previous": 2},
        "rollback": {"champion": 1, "challenger": 3},
    }[action]

    dying = processes.Process(target=die, args=(root, action, surface, writes))
    dying.start()
    dying.join(60)
    assert dying.exitcode == -signal.SIGKILL

    # Even before anyone repairs anything there is one champion, the old one or the new one.
    happened = writes >= MOVES_CHAMPION[action]
    assert registry.aliases(surface)["champion"] == (after if happened else before)["champion"]
    ended = registry.recover(surface)
    if 0 < writes < WRITES[action]:
        assert ended is not None
        assert (ended.action, ended.actor) == (action, "the dead")
        assert ended.outcome == ("completed by recovery" if happened else "undone by recovery")
    else:
        assert ended is None
    assert registry.aliases(surface) == (after if happened else before)
    assert registry.recover(surface) is None
    last = registry.history(surface)[-1]
    assert last.after == registry.aliases(surface)
    assert last.action == ("nominate" if writes == 0 else action)


def test_two_actors_at_once(root: Path, model_uri: str, processes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever two processes do to one surface, each record begins where the one before it ended."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    registry = Registry(root)
    promote(registry, "contested", model_uri)
    promote(registry, "contested", model_uri)
    actors = [processes.Process(target=act, args=(root, "contested", 4, name)) for name in ("ann", "ben")]
    for actor in actors:
        actor.start()
    for actor in actors:
        actor.join(120)
    assert [actor.exitcode for actor in actors] == [0, 0]
    history = registry.history("contested")
    assert {r.actor for r in history} >= {"ann", "ben"}
    assert all(r.outcome == "done" for r in history)
    for earlier, later in pairwise(history):
        assert earlier.after == later.before
    assert history[-1].after == registry.aliases("contested")
    assert registry.recover("contested") is None
