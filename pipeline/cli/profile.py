"""trefoil profile"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.cli.common import console, finish, parse

DESCRIPTION = """What serving costs: latency, throughput, operations and bytes of artifacts over shapes of batches.

Example:  trefoil profile --artifact hf sr --out cost.json"""


COLUMNS = ("requests", "candidates", "history", "p50 ms", "p99 ms", "candidates/s", "s/1000")


@dataclass(frozen=True, kw_only=True)
class Args:
    artifact: tuple[Path, ...]
    """Folders of artifacts."""
    requests: tuple[int, ...] = (1, 16)
    """Requests in a batch."""
    candidates: tuple[int, ...] = (1, 16, 64, 256)
    """Candidates of each request."""
    history: tuple[int, ...] | None = None
    """Events of each request; none given measures an empty history and the longest one."""
    seconds: float = 2.0
    """The most time for each shape, in six turns."""
    precision: float = 0.02
    """Stop a shape's turn once the 95 % interval of its mean time is within this share of it."""
    device: Literal["cpu", "cuda", "all"] = "all"
    """Where to measure; all is the CPU, and CUDA where there is some."""
    out: Path | None = None
    """JSON file to write."""
    json: bool = False
    """Print the result as JSON."""
    quiet: bool = False
    """Print nothing but errors, and with --json the result."""


def main(argv: list[str]) -> int:
    args = parse(Args, argv, verb="profile", description=DESCRIPTION)
    from rich.table import Table

    from pipeline.errors import ConfigError
    from pipeline.progress import Bar
    from pipeline.serve.profile import devices, profile
    from pipeline.train.quiet import quiet_dependencies

    if not args.artifact:
        raise ConfigError("artifact names no folder; give one or more made by `trefoil export`")
    quiet_dependencies()
    out = console(args)
    found = []
    for folder in args.artifact:
        for device in devices() if args.device == "all" else (args.device,):
            with Bar(out, "turns") as bar:
                result = profile(
                    folder,
                    requests=args.requests,
                    candidates=args.candidates,
                    history=args.history,
                    seconds=args.seconds,
                    precision=args.precision,
                    device=device,
                    progress=bar,
                )
            found.append(result)
            title = f"{result['surface']}, {result['dtype']}{', compiled' if result['compiled'] else ''} on {device}"
            table = Table(*COLUMNS, title=title)
            shapes = result["shapes"]
            assert isinstance(shapes, list), "one entry a shape"
            for s in shapes:
                table.add_row(
                    *(str(s[k]) for k in ("requests", "candidates", "history")),
                    f"{s['score_ms']['p50']:.2f}",
                    f"{s['score_ms']['p99']:.2f}",
                    f"{s['candidates_per_second']:,.0f}",
                    f"{s['seconds_per_thousand_candidates']:.4f}",
                )
            out.print(table)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"profiles": found}, indent=1), encoding="utf-8")
        out.print(f"wrote {args.out}")
    return finish({"profiles": found}, args.json)
