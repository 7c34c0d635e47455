"""What verbs share: parsing, and where text and JSON go."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import tyro
from rich.console import Console

Args = TypeVar("Args")


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


def console(as_json: bool) -> Console:
    """Where people's text goes: standard output, or with --json standard error."""
    return Console(stderr=as_json, highlight=False)


def finish(result: Mapping[str, Any], as_json: bool) -> int:
    """Print a verb's result for machines, if asked for; returns 0."""
    if as_json:
        sys.stdout.write(json.dumps(result, indent=1) + "\n")
    return 0
