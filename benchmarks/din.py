"""Training speed of the unified model beside DIN's, on one thread, or one GPU, of the same machine.

    python -m benchmarks.din [--data KUAIRAND_LOG]

DIN (Zhou et al., KDD 2018) on the same features, tables, optimizer, batches of requests and loader, but with one
candidate a row, as it is published: each row looks up and reads its own copy of the user's history. It stands twice:
with the unit of 36 and the layers of 200 and 80 of the paper, and with the unit of 80 and 40 and the layers of 80 and
40 of the code that its authors released (github.com/zhougr1993/DeepInterestNetwork), which most libraries copy. (The
unit's first layer is split so that no [rows, history, 4 width] tensor exists: both are faster than published.)
Rounds are interleaved; processor time on CPU, wall time on a GPU; loading included.

On the simulated log a request has several candidates and a longer history; KuaiRand has one candidate a request, where
request-level broadcasting can save nothing and only lighter blocks can.

What it does not show: quality (see benchmarks.quality, arm `din`).
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.common import Report, interleaved, median_ratio
from pipeline.config import DaysConfig, HistoryConfig, RunConfig
from pipeline.data.logs import Dataset
from pipeline.data.simulate import SimulationConfig, simulate
from pipeline.recipes import kuairand as recipes
from pipeline.train.sharding import Ranks, joined
from pipeline.train.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class Settings:
    data: Path | None = None
    """Folder of the log that `trefoil ingest kuairand` wrote; without it the simulated log alone is measured."""
    candidates: int = 16
    """Candidates of a request of the simulated log."""
    history: int = 100
    """Events of a history of the simulated log."""
    steps: int = 8
    """Steps of a round."""
    rounds: int = 5
    """Interleaved rounds."""
    quick: bool = False
    """Fewer and shorter rounds: does it run, not what is true."""


def sides(tasks: tuple[str, ...]) -> dict[str, RunConfig]:
    """What is timed."""
    unified = recipes.kuairand()
    transformer = replace(unified.model, history=HistoryConfig(kind="transformer", width=32, heads=2))
    made = {"unified": unified, "unified_transformer": replace(unified, model=transformer), "din": recipes.din()}
    made["din_released"] = recipes.din_released()
    return {n: replace(c, tasks=tasks, days=DaysConfig(validation=1, test=1)) for n, c in made.items()}


def clock(ranks: Ranks) -> float:
    """Seconds: of the processor, or of the wall once a GPU has done its work."""
    if ranks.device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(ranks.device)
    return time.perf_counter()


def rates(dataset: Dataset, tasks: tuple[str, ...], settings: Settings, ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Impressions a second of each side, by round, and DIN's share of ours."""

    def side(name: str, config: RunConfig) -> Callable[[], float]:
        trainer = Trainer(config, dataset, ranks, folder / name)
        trainer.model.train()
        steps = trainer.steps(itertools.chain.from_iterable(map(trainer.loader.batches, range(99))))
        next(steps)  # the pipeline fills

        def measure() -> float:
            start = clock(ranks)
            rows = sum(
                sum(outputs.batch.inputs.candidates_per_surface) for outputs in itertools.islice(steps, settings.steps)
            )
            return rows / (clock(ranks) - start)

        return measure

    found = interleaved({n: side(n, c) for n, c in sides(tasks).items()}, settings.rounds)
    return {
        "impressions_per_second": found,
        "unified_over_din": median_ratio(found["unified"], found["din"]),
        "unified_over_din_released": median_ratio(found["unified"], found["din_released"]),
        "unified_transformer_over_din": median_ratio(found["unified_transformer"], found["din"]),
    }


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    if settings.quick:
        settings = replace(settings, steps=2, rounds=2, history=50)
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        simulated = SimulationConfig(
            requests=6_000,
            days=3,
            users=500,
            candidates=settings.candidates,
            history=settings.history,
            candidate_spread=0,
            warmup_days=5,
        )
        logs = {"simulated": (simulate(folder / "log", simulated), ("click", "long_click"))}
        if settings.data is not None:
            logs["kuairand"] = (Dataset.open(settings.data), ("click", "long_view"))
        ranks = stack.enter_context(joined())
        for name, (dataset, tasks) in logs.items():
            figures |= {f"{name}_{k}": v for k, v in rates(dataset, tasks, settings, ranks, folder / name).items()}
    Report("din", settings).finish(figures)


if __name__ == "__main__":
    main()
