"""Fuzzing of every reader: `python -m tests.faults.fuzz --cases 100000`.

Each case is a damaged valid example (see `targets`). The corpus holds what was once a defect, damaged further in each
campaign, and is replayed by the suite. With `--atheris` cases are guided by coverage of our own code instead of drawn.

A defect is an error that is not a TrefoilError, a case that takes longer than `LIMIT_S` of processor time, or one that
is accepted and does not hold up to use. The status is 1 if there is any; each is written to the corpus.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import math
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common import Report
from pipeline.errors import TrefoilError
from tests.faults.targets import Target, make_targets

CORPUS = Path(__file__).parent / "corpus"
LIMIT_S = 10
# Of one name, this many defects are kept.
KEPT = 3


class Hang(Exception):
    """A case took too long."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """At most `LIMIT_S` of this process's processor time."""

    def expire(*_: object) -> None:
        raise Hang(f"more than {LIMIT_S} s")

    before = signal.signal(signal.SIGVTALRM, expire)
    signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def defect(target: Target, data: bytes) -> str:
    """What is wrong with how a target takes a case, as kind and place; empty if nothing."""
    try:
        with limited(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                target.run(data)
            except TrefoilError as error:
                str(error).encode()  # a message that cannot be printed is a defect too
    except Exception as error:  # noqa: BLE001  that is what is looked for
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/tests/faults/" not in f.filename]
        ours = [f for f in frames if "/pipeline/" in f.filename]
        where = (ours or frames or traceback.extract_tb(error.__traceback__))[-1]
        return f"{type(error).__name__} at {Path(where.filename).name}:{where.name}: {str(error)[:120]!a}"
    return ""


def seeds_of(target: Target) -> list[bytes]:
    """Valid examples and what was once a defect."""
    return [*target.seeds, *(path.read_bytes() for path in corpus_of(target))]


def corpus_of(target: Target) -> list[Path]:
    return sorted((CORPUS / target.name).glob("*"))


def campaign(target: Target, cases: int, seed: int) -> tuple[int, int, dict[str, bytes], Counter[str]]:
    """Run cases; returns how many were run, how many accepted, defects by name, and how often each came."""
    rng = random.Random(f"{seed}/{target.name}")
    seeds = seeds_of(target)
    found: dict[str, bytes] = {}
    often: Counter[str] = Counter()
    for number in range(cases):
        data = rng.choice(seeds if rng.random() < 0.3 else target.seeds)
        try:
            data = target.damage(data, rng)
        except Exception:  # noqa: BLE001  a corpus file need not be well-formed enough to be damaged by structure
            data = target.damage(target.seeds[0], rng)
        if problem := defect(target, data):
            name = problem.partition(": ")[0]
            often[name] += 1
            found.setdefault(problem if often[name] <= KEPT else name, data)
        if number % 5000 == 4999:
            print(f"  {target.name}: {number + 1} cases, {sum(often.values())} defects", flush=True)
    return cases, sum(often.values()), found, often


def keep(target: Target, defects: dict[str, bytes]) -> None:
    """Write defects to the corpus."""
    for data in defects.values():
        path = CORPUS / target.name / hashlib.sha256(data).hexdigest()[:12]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def guided(target: Target, cases: int, folder: Path) -> None:
    """Run atheris on one target; does not return. A defect ends it and is written to `folder`."""
    import atheris

    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    for i, data in enumerate(seeds_of(target)):
        (folder / "corpus" / str(i)).write_bytes(data)

    def one(data: bytes) -> None:
        if problem := defect(target, data):
            raise RuntimeError(problem)

    def mutate(data: bytes, size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        try:
            return target.damage(data, rng)[:size] if rng.random() < 0.5 else atheris.Mutate(data, size)
        except Exception:  # noqa: BLE001  not well-formed enough
            return atheris.Mutate(data, size)

    options = [f"-runs={cases}", "-max_len=65536", f"-artifact_prefix={folder}/", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *options, str(folder / "corpus")], one, custom_mutator=mutate)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=100_000, help="of all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="*", help="only these")
    parser.add_argument("--atheris", action="store_true", help="coverage-guided; one target")
    parser.add_argument("--keep", action="store_true", help="add defects to the corpus")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="trefoil-fuzz-") as name:
        work = Path(name)
        os.chdir(work)
        if args.atheris:
            return run_guided(args, work)
        targets = make_targets(work / "targets", tuple(args.targets) if args.targets else None)
        start, figures, bad = time.monotonic(), {}, 0
        whole = sum(t.share for t in targets.values())
        table = Table("target", "cases", "seconds", "defects", title="fuzzing")
        for target in targets.values():
            began = time.monotonic()
            cases = math.ceil(args.cases * target.share / whole)
            ran, defects, found, often = campaign(target, cases, args.seed)
            seconds = time.monotonic() - began
            table.add_row(target.name, str(ran), f"{seconds:.0f}", str(defects), style="red" if defects else None)
            figures[target.name] = {"cases": ran, "defects": defects, "kinds": dict(often)}
            bad += defects
            for problem in found:
                print(f"  DEFECT {target.name}: {problem}", flush=True)
            if args.keep:
                keep(target, found)
    Console(width=120).print(table)
    cases = sum(f["cases"] for f in figures.values())
    settings = {"seed": args.seed, "cases": args.cases}
    Report("fuzz", settings).finish(
        {"cases": cases, "defects": bad, "seconds": round(time.monotonic() - start), "targets": figures}
    )
    return 1 if bad else 0


def run_guided(args: Any, work: Path) -> int:
    import atheris

    with atheris.instrument_imports(include=["pipeline", "yaml"]):
        import pipeline.config
        import pipeline.data.ingest.load
        import pipeline.data.logs
        import pipeline.rollout.plan
        import pipeline.sweep.space  # noqa: F401
    (name,) = args.targets
    guided(make_targets(work / "targets", (name,))[name], args.cases, work / "guided")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
