"""The `trefoil` command: one thin module a verb, imported when it is called, so that help is instant."""

from __future__ import annotations

import errno
import importlib
import os
import sys

from pipeline.errors import TrefoilError, unknown, without_passwords

VERBS = {
    "simulate": "make multi-surface ads logs whose true probabilities are known",
    "ingest": "turn flat impression logs into a Trefoil log",
    "inspect": "what a log holds, checked",
    "train": "train, validate and test a recipe on a log",
    "daily": "train on each new day of a log, scored before it is trained on",
    "evaluate": "score a log's days with a checkpoint, per surface and task",
    "sweep": "search a recipe's fields, judged on validation days",
    "compare": "differences between runs on the same rows, paired",
    "export": "make one surface's serving artifact from a checkpoint, and register it",
    "unshard": "write a checkpoint to one file of plain tensors",
    "score": "score a file of rows with an artifact",
    "profile": "what serving artifacts costs: latency, throughput, operations, bytes",
    "rollout": "staged unification: plan, waves, gates, promotion, rollback, replay",
    "plan": "where tables would lie on a cluster that is not there, and what it takes",
    "recipes": "the shipped recipes",
    "sync": "send MLflow what a run's records still hold",
    "completion": "print a script that completes verbs and flags in bash or zsh",
    "doctor": "what works on this machine and what does not",
}

# What to do about an error of the operating system.
HINTS = {
    errno.ENOSPC: "make room, and give the same command again: what is done is kept",
    errno.EDQUOT: "make room, and give the same command again: what is done is kept",
    errno.EACCES: "give a folder that you may write to, or ask its owner",
    errno.EPERM: "give a folder that you may write to, or ask its owner",
    errno.EROFS: "give a folder on a disk that can be written to",
    errno.ENOENT: "check the path",
    errno.EMFILE: "let the shell open more files, such as `ulimit -n 65536`",
    errno.ENOMEM: "give the process more memory, or less work at a time",
    errno.EIO: "look at the disk's health before you trust what lies on it",
}


def main(argv: list[str] | None = None) -> int:
    """Run a verb; returns the exit status: 0 done, 1 an error of ours, 2 wrong usage."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    verb, *rest = arguments
    if verb == "--version":
        from importlib.metadata import version

        print(version("trefoil"))
        return 0
    if verb not in VERBS:
        print(f"trefoil: {unknown('verb', verb, VERBS)}", file=sys.stderr)
        return 2
    try:
        return int(importlib.import_module(f"pipeline.cli.{verb}").main(rest))
    except TrefoilError as error:
        print(f"trefoil {verb}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Who reads our output has read enough, as `| head` does. Python would fail once more while it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        # A disk that is full, read-only or forbidden; a file that went away.
        where = f" ({error.filename})" if error.filename else ""
        hint = f"; {HINTS[error.errno]}" if error.errno in HINTS else ""
        print(without_passwords(f"trefoil {verb}: {error.strerror or error}{where}{hint}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"trefoil {verb}: interrupted", file=sys.stderr)
        return 130


def _help() -> str:
    verbs = "\n".join(f"  {name:10} {what}" for name, what in VERBS.items())
    return (
        "usage: trefoil VERB [flags]\n\n"
        "One engagement model for all surfaces: trained together, exported once per surface.\n\n"
        f"{verbs}\n\n"
        "`trefoil VERB --help` says more. First steps:\n"
        "  trefoil simulate --out logs\n"
        "  trefoil train --recipe demo --data logs --nproc 2"
    )
