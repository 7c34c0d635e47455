"""How parameters that belong to one surface or task are named.

Submodules and parameters of surface `hf` live under a name part `surface_hf`, those of task `click` under
`task_click`. So a parameter belongs to a surface exactly when one part of its dotted name says so, and a model
pruned to some surfaces loads a plain selection of the names of the whole model (`keep_surfaces`).
The prefix keeps names apart from attributes of torch's containers (a task may be called `type`).

Example:
    >>> surface_key("hf")
    'surface_hf'
    >>> sorted(keep_surfaces({"towers.surface_hf.w": 1, "towers.surface_sr.w": 2, "deep.w": 3}, keep=["sr"]))
    ['deep.w', 'towers.surface_sr.w']
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

Value = TypeVar("Value")
SURFACE = "surface_"
TASK = "task_"


def surface_key(surface: str) -> str:
    """Name part of what belongs to `surface`. Raises ValueError where the name has a dot or is empty."""
    return _key(SURFACE, surface)


def task_key(task: str) -> str:
    """Name part of what belongs to `task`. Raises ValueError where the name has a dot or is empty."""
    return _key(TASK, task)


def _key(prefix: str, name: str) -> str:
    if not name or "." in name:
        raise ValueError(f"{name!r} cannot name a {prefix[:-1]}: it must be non-empty and without a dot")
    return prefix + name


def surface_of(parameter: str) -> str | None:
    """The surface that a dotted parameter name belongs to; None for what all surfaces share."""
    for part in parameter.split("."):
        if part.startswith(SURFACE):
            return part.removeprefix(SURFACE)
    return None


def keep_surfaces(state: Mapping[str, Value], *, keep: Iterable[str]) -> dict[str, Value]:
    """The entries of a state_dict that a model of the surfaces `keep` has."""
    kept = set(keep)
    return {name: value for name, value in state.items() if surface_of(name) is None or surface_of(name) in kept}


def check_names(what: str, names: Sequence[str]) -> tuple[str, ...]:
    """The names as a tuple.

    Raises:
        ValueError: there is none, or one stands twice.
    """
    if not names or len(set(names)) != len(names):
        raise ValueError(f"{what} must be one or more different names, got {list(names)}")
    return tuple(names)


def check_at_least(least: float, **values: float) -> None:
    """Raise ValueError, naming value and bound, for the first keyword below `least`."""
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
