"""What verbs share: parsing, and where text and JSON go."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import tyro
from rich.console import Console

Args = TypeVar("Args")
# Columns of a file or pipe: wider than any line.
UNBROKEN = 10_000


def parse(kind: Callable[..., Args], argv: list[str], *, verb: str, description: str, default: Any = None) -> Args:
    """Flags of a verb; wrong ones end the process with status 2 and the nearest valid name."""
    return tyro.cli(
        kind,
        args=argv,
        prog=f"trefoil {verb}",
        description=description,
        default=default,
        config=(tyro.conf.HelptextFromCommentsOff,),
    )


class Printing(Protocol):
    """Flags of a verb that say what it prints."""

    @property
    def json(self) -> bool: ...

    @property
    def quiet(self) -> bool: ...


def console(args: Printing) -> Console:
    """Where people's text goes: standard output, with --json standard error, with --quiet nowhere.

    A terminal has colours, unless NO_COLOR is set, and its own width. A file or pipe gets plain text whose lines are
    not broken, unless COLUMNS says how wide it is.
    """
    out = Console(stderr=args.json, highlight=False, quiet=args.quiet)
    if not out.is_terminal and "COLUMNS" not in os.environ:
        out.width = UNBROKEN
    return out


def finish(result: Mapping[str, Any], as_json: bool) -> int:
    """Print a verb's result for machines, if asked for; returns 0."""
    if as_json:
        sys.stdout.write(json.dumps(result, indent=1) + "\n")
    return 0
