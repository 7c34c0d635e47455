"""trefoil rollout"""

from __future__ import annotations

import importlib
import sys

from pipeline.errors import unknown

VERBS = {
    "plan": "measure what surfaces cost, and plan the waves",
    "run": "train, measure and judge a wave; what passes becomes challenger",
    "status": "which version of each surface serves, waits, and served before",
    "promote": "make a surface's challenger its champion",
    "rollback": "make a surface's previous version its champion again",
    "history": "who changed what, when, and on which evidence",
    "replay": "watch candidates on a later day's logs; take back what does harm",
}


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        sys.exit(0)
    verb, *rest = argv
    if verb not in VERBS:
        print(f"trefoil rollout: {unknown('verb', verb, VERBS)}", file=sys.stderr)
        return 2
    return int(importlib.import_module(f"pipeline.cli.rollout_{verb}").main(rest))


def _help() -> str:
    verbs = "\n".join(f"  {name:10} {what}" for name, what in VERBS.items())
    return (
        "usage: trefoil rollout VERB [flags]\n\n"
        "Staged unification: surfaces join the unified model in waves, cheap and alike first, through gates.\n\n"
        f"{verbs}\n\n"
        "`trefoil rollout VERB --help` says more. In this order:\n"
        "  trefoil rollout plan --recipe demo_staged --data logs --out plan.yaml\n"
        "  trefoil rollout run --plan plan.yaml --data logs --wave 0 --promote\n"
        "  trefoil rollout run --plan plan.yaml --data logs --wave 1\n"
        "  trefoil rollout promote hf --plan plan.yaml"
    )
