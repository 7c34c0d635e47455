"""One change of a surface's aliases, whole or not at all, though MLflow moves one alias at a time.

A change writes its intent, moves `previous`, moves `champion` (from this moment it has happened), frees what is to be
free, writes its record, and removes the intent. An error undoes the moves. A process that dies leaves the intent, and
whoever comes next finishes the change if `champion` has moved, or undoes it if not. At every moment a surface that had
a champion has exactly one.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pipeline.errors import RegistryError
from pipeline.rollout import audit
from pipeline.rollout.audit import Record

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHALLENGER, CHAMPION, PREVIOUS = "challenger", "champion", "previous"
ALIASES = (CHALLENGER, CHAMPION, PREVIOUS)
# The order in which aliases are set: the champion's place is noted before another takes it.
_ORDER = (PREVIOUS, CHAMPION, CHALLENGER)
# An intent of another machine, whose lock cannot be seen here, is taken for a dead one's after this time.
_OTHER_MACHINE_S = 60.0
Aliases = dict[str, int]


def model_name(surface: str) -> str:
    """The registered name of a surface's model.

    >>> model_name("hf")
    'trefoil-hf'
    """
    return f"trefoil-{surface}"


def make(client: MlflowClient, record: Record) -> None:
    """Make a change: intent, moves, record, end. An error undoes the moves, as far as MLflow still answers."""
    name = model_name(record.surface)
    try:
        client.set_registered_model_tag(name, audit.INTENT, audit.dump(record))
        _move(client, record.surface, record.before, record.after)
        client.set_registered_model_tag(name, record.tag, audit.dump(record))
    except Exception as cause:
        try:
            _move(client, record.surface, aliases_of(client, record.surface), record.before)
            tags = tags_of(client, record.surface)
            for tag in (record.tag, audit.INTENT):
                if tag in tags:
                    client.delete_registered_model_tag(name, tag)
        except Exception as second:  # noqa: BLE001  # whatever it was, the user must hear of the half-made change
            raise RegistryError(
                f"an alias of {name} could not be moved ({cause}), nor could those before it be moved back "
                f"({second}); the next `trefoil rollout` command that reaches MLflow finishes or undoes it"
            ) from cause
        raise
    client.delete_registered_model_tag(name, audit.INTENT)


def recover(client: MlflowClient, surface: str) -> Record | None:
    """Finish or undo what a dead process left; returns the record of how, None if there is nothing.

    Raises:
        RegistryError: another machine wrote the intent a moment ago.
    """
    tags = tags_of(client, surface)
    if audit.INTENT not in tags:
        return None
    begun = audit.load_record(tags[audit.INTENT], where=f"{audit.INTENT} of {model_name(surface)}")
    if begun.host != socket.gethostname() and begun.age_s < _OTHER_MACHINE_S:
        raise RegistryError(
            f"{begun.actor} on {begun.host} began to {begun.action} surface {surface!r} {begun.age_s:.0f} s ago; "
            "nothing was changed, try again in a minute"
        )
    now = aliases_of(client, surface)
    # The champion's move is the change; where it does not move, everything before the record is harmless to repeat.
    happened = now.get(CHAMPION) == begun.after.get(CHAMPION)
    _move(client, surface, now, begun.after if happened else begun.before)
    ended = begun.ended("completed by recovery" if happened else "undone by recovery")
    if begun.tag not in tags:
        client.set_registered_model_tag(model_name(surface), ended.tag, audit.dump(ended))
    client.delete_registered_model_tag(model_name(surface), audit.INTENT)
    return ended


def _move(client: MlflowClient, surface: str, now: Mapping[str, int], to: Mapping[str, int]) -> None:
    """Move aliases from `now` to `to`: set those that are to be set, in order, then free the rest."""
    name = model_name(surface)
    for alias in _ORDER:
        if alias in to and now.get(alias) != to[alias]:
            client.set_registered_model_alias(name, alias, str(to[alias]))
    for alias in _ORDER:
        if alias in now and alias not in to:
            client.delete_registered_model_alias(name, alias)


def aliases_of(client: MlflowClient, surface: str) -> Aliases:
    """Version by alias; nothing where no model is registered."""
    found = client.search_registered_models(filter_string=f"name = '{model_name(surface)}'")
    if not found:
        return {}
    # The search leaves aliases out on some stores; the single model has them on all.
    aliases = client.get_registered_model(model_name(surface)).aliases
    return {alias: int(number) for alias, number in aliases.items() if alias in ALIASES}


def tags_of(client: MlflowClient, surface: str) -> dict[str, str]:
    """Tags of the registered model; none where there is none."""
    found = client.search_registered_models(filter_string=f"name = '{model_name(surface)}'")
    return dict(client.get_registered_model(model_name(surface)).tags) if found else {}
