"""What the tests of crashes run in processes of their own."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.rollout.registry import Registry

CALLS = (
    "set_registered_model_tag",
    "set_registered_model_alias",
    "delete_registered_model_alias",
    "delete_registered_model_tag",
)


def each_call(registry: Registry, surface: str, wrap: Callable[[Any], Any], patch: Callable[..., None]) -> None:
    """Wrap every writing call of the registry's client."""
    registry.aliases(surface)  # makes the client
    for name in CALLS:
        patch(registry._client, name, wrap(getattr(registry._client, name)))


def die(root: Path, action: str, surface: str, after: int) -> None:
    """Begin a promotion or rollback and be killed, not to be caught, when `after` writes have been made."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    registry, calls = Registry(root), 0

    def dying(real: Any) -> Any:
        def call(*args: Any) -> None:
            nonlocal calls
            if calls == after:
                os.kill(os.getpid(), signal.SIGKILL)
            calls += 1
            real(*args)

        return call

    each_call(registry, surface, dying, setattr)
    getattr(registry, action)(surface, actor="the dead")
    os.kill(os.getpid(), signal.SIGKILL)  # died after its last write


def act(root: Path, surface: str, times: int, actor: str) -> None:
    """Roll forth and back, whatever others do at the same time."""
    from pipeline.errors import RegistryError
    from tests.rollout.crashes import promote_any

    os.environ.pop("MLFLOW_TRACKING_URI", None)
    registry = Registry(root)
    for _ in range(times):
        for change in (promote_any, Registry.rollback):
            try:
                change(registry, surface, actor=actor)
            except RegistryError as error:
                if "no previous" not in str(error):
                    raise


def promote_any(registry: Registry, surface: str, *, actor: str) -> None:
    """Nominate version 2 with evidence against whatever serves, and promote it."""
    from pipeline.errors import RegistryError
    from tests.rollout.models import evidence

    try:
        now = registry.aliases(surface)
        registry.nominate(surface, 2, evidence(surface, champion=now.get("champion")), actor=actor)
        registry.promote(surface, actor=actor)
    except RegistryError as error:
        # Between two steps of one actor the other may act; the registry refuses what is no longer true.
        if "serves now" not in str(error) and "no challenger" not in str(error):
            raise
