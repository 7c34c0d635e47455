"""trefoil recipes"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.cli.common import console, finish, parse
from pipeline.recipes import SHIPPED


@dataclass(frozen=True, kw_only=True)
class Args:
    json: bool = False
    """Print the result as JSON."""
    quiet: bool = False
    """Print nothing but errors, and with --json the result."""


def main(argv: list[str]) -> int:
    args = parse(Args, argv, verb="recipes", description="The shipped recipes. Example:  trefoil recipes --json")
    out = console(args)
    for name, (module, _, what) in SHIPPED.items():
        out.print(f"{name:16} {what}  ({module.replace('.', '/')}.py)")
    return finish({name: what for name, (_, _, what) in SHIPPED.items()}, args.json)
