"""trefoil ingest"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from pipeline.cli.common import console, finish, parse
from pipeline.data.ingest import ingest, refuse_leaks
from pipeline.errors import ConfigError
from pipeline.progress import Bar

DESCRIPTION = """Turn flat impression logs (CSV, Parquet) into a Trefoil log. See docs/data.md for specs.

Example:  trefoil ingest kuairand --out logs root=path/to/KuaiRand-Pure"""


@dataclass(frozen=True, kw_only=True)
class Args:
    spec: tyro.conf.Positional[str]
    """A shipped spec's name, or the path of a YAML file."""
    params: tyro.conf.Positional[tuple[str, ...]] = ()
    """Parameters of the spec, each written name=value."""
    out: Path
    """Folder to write; must not yet hold a log."""
    keep_state: bool = False
    """Keep what later days need, so that they can be ingested on their own."""
    previous: Path | None = None
    """Log of the days before, written with --keep-state; only later days are ingested."""
    memory_gb: float = 4.0
    """Memory that each process stays within, roughly."""
    jobs: int = 1
    """Processes that work at the same time."""
    workers: int = 1
    """How many times this same command is started, on nodes that share the folder, to share the work."""
    check_leaks_at_ms: int | None = None
    """Write only if no feature of a request up to this time (ms since 1970, best the middle of the log) changes when
    every outcome not known then does; takes two ingests more."""
    json: bool = False
    """Print the result as JSON."""
    quiet: bool = False
    """Print nothing but errors, and with --json the result."""


def main(argv: list[str]) -> int:
    args = parse(Args, argv, verb="ingest", description=DESCRIPTION)
    out = console(args)
    params = {}
    for text in args.params:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"parameter {text!r} is not written name=value, such as root=path/to/logs")
        params[name] = value
    if args.check_leaks_at_ms is not None:
        out.print("changing outcomes to see whether a feature changes too early", style="dim")
        refuse_leaks(args.spec, params, at=args.check_leaks_at_ms, memory_gb=args.memory_gb, jobs=args.jobs)
    what = ""
    with Bar(out, "steps") as bar:

        def begin(text: str) -> None:
            nonlocal what
            what = text
            if not out.is_terminal:
                out.print(text)

        dataset = ingest(
            args.spec,
            args.out,
            params,
            progress=begin,
            count=lambda done, total: bar(done, total, what),
            previous=args.previous,
            keep_state=args.keep_state,
            memory_gb=args.memory_gb,
            jobs=args.jobs,
            workers=args.workers,
        )
    sizes = {s: sum(p.requests for p in dataset.partitions(s)) for s in dataset.schema.surfaces}
    shown = sum(p.impressions for p in dataset.description.partitions)
    out.print(f"wrote {args.out}: {sum(sizes.values()):,} requests, {shown:,} impressions, {len(dataset.days)} days")
    return finish({"data": str(args.out), "requests": sizes, "impressions": shown, "days": dataset.days}, args.json)
