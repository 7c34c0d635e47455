"""How many requests one run of a program should hold: a sweep of latency and memory over their number.

Each request is a user of its own, with the longest history that the program reads and the same number of candidates.
Throughput rises with the number until operators are busy; from there on more requests only cost latency and memory.
The bound is the largest number tried that stays within the budget and is no slower a candidate than the best by more
than a tenth. Times are of one thread and of this machine: export where you serve, or give the bound.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from pipeline.errors import ArtifactError
from pipeline.serve.example import made_up_requests
from pipeline.serve.measure import one_thread, peak_bytes, times
from pipeline.serve.rows import to_requests
from pipeline.serve.runtime import Program
from pipeline.serve.scorer import Scorer

CANDIDATES = 16  # of each request of the sweep
_MOST = 1024
_REPEATS, _SECONDS = 7, 1.0
_SLOWER = 1.1


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What one run of a program may cost in the sweep.

    Args:
        latency_ms: time of the quickest of a few runs; what else the machine does only ever adds to it.
        memory_mb: the most memory of its tensors at once, weights not counted.
    """

    latency_ms: float = 50.0
    memory_mb: float = 256.0


DEFAULT_BUDGET = Budget()


def sweep(scorer: Scorer, graph: Program, budget: Budget) -> tuple[int, dict[str, object]]:
    """The bound, and the content of `bound.json`: the points tried, the budget and the bound.

    Args:
        scorer: of the artifact.
        graph: the artifact's program uncompiled, whose memory can be watched; compiled code needs less.
        budget: what a run may cost.

    Raises:
        ArtifactError: not even one request stays within the budget; both numbers are named.
    """
    points: list[dict[str, float]] = []
    requests = 1
    with one_thread():
        while requests <= _MOST:
            points.append(_point(scorer, graph, requests))
            if _over(points[-1], budget):
                break
            requests *= 2
    allowed = [p for p in points if not _over(p, budget)]
    if not allowed:
        first = points[0]
        raise ArtifactError(
            f"one request of {CANDIDATES} candidates takes {first['latency_ms']:.3g} ms and "
            f"{first['memory_mb']:.3g} MB, the budget of a run is {budget.latency_ms:g} ms and "
            f"{budget.memory_mb:g} MB; allow more (--latency-ms, --memory-mb), or give trefoil export the "
            "bound (--max-requests)"
        )
    best = min(p["latency_ms"] / p["requests"] for p in allowed)
    bound = max(p["requests"] for p in allowed if p["latency_ms"] / p["requests"] <= _SLOWER * best)
    return int(bound), {
        "max_requests": int(bound),
        "budget": asdict(budget),
        "candidates": CANDIDATES,
        "history": scorer.signature.history_length,
        "points": points,
    }


def _point(scorer: Scorer, graph: Program, requests: int) -> dict[str, float]:
    signature = scorer.signature
    table = made_up_requests(
        signature.schema,
        signature.surface,
        candidates=[CANDIDATES] * requests,
        history=[signature.history_length] * requests,
    )
    block = to_requests(table, signature, "the sweep").block

    found = times(lambda: scorer.run(block), repeats=_REPEATS, seconds=_SECONDS, warm_up=1)
    return {
        "requests": requests,
        "latency_ms": float(np.min(found)),
        "memory_mb": peak_bytes(lambda: scorer.run(block, graph), graph.device) / 1e6,
    }


def _over(point: dict[str, float], budget: Budget) -> bool:
    return point["latency_ms"] > budget.latency_ms or point["memory_mb"] > budget.memory_mb
