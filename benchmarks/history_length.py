"""How long histories must be: what is left to know of a user who is known but for events that the log has cut off.

    python -m benchmarks.history_length

A world of the default setting of `benchmarks.simulated` is drawn with histories that hold all that still counts. The
reader of this benchmark knows the simulator: every probability is the true one, but for the effect of the user's
earlier actions, which it computes from the newest events alone, as many as each line says. What it loses is
"gap closed" below 1: (trivial - reader) / (trivial - oracle) in the click's NE, over the last two days.

No model that is given such histories can be expected to do better by much: it may guess from what it sees what was cut
off, and has everything else to learn.

What it does not show: real logs, where nobody knows how long an action counts.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tyro

from benchmarks.common import Report
from benchmarks.simulated import TASK, gap_closed, worlds

if TYPE_CHECKING:
    import polars as pl

    from pipeline.data.logs import Dataset
    from pipeline.data.simulate import SimulationConfig
    from pipeline.data.simulate.world import World

CHUNK = 1_024  # requests whose events are in memory at a time


@dataclass(frozen=True, kw_only=True)
class Settings:
    lengths: tuple[int, ...] = (24, 48, 96, 192, 384)
    """Newest events that the reader has."""
    whole: int = 768
    """Events of a history that lacks nothing: a user's of several days."""
    requests: int = 60_000
    """Requests of the log, over 14 days; users grow with them, so that each is as busy in a log of another size."""
    seed: int = 0
    """World."""
    resamples: int = 1000
    """Resamples of users behind each interval."""
    quick: bool = False
    """A tiny log: does it run, not what is true."""


def reinforced(
    config: SimulationConfig, world: World, surface: int, requests: pl.DataFrame, lengths: tuple[int, ...]
) -> np.ndarray:
    """Effect of earlier actions on a user's interest, in logits, from the newest events of each request's history.

    The formula is docs/simulator.md's: r, then reinforcement * tanh(r).

    Args:
        config: of the log.
        world: of the log.
        surface: index of the surface that the requests are of.
        requests: `timestamp_ms` and the lists `history_item`, `history_action`, `history_surface` and
            `history_time_ms`, oldest event first.
        lengths: how many of the newest events to read.

    Returns:
        [lengths, requests, dimensions].
    """
    from pipeline.data.simulate.response import effect_of
    from pipeline.data.simulate.schema import TASKS
    from pipeline.data.simulate.users import HOUR_MS

    found = np.zeros((len(lengths), requests.height, world.dimensions), dtype=np.float32)
    for start in range(0, requests.height, CHUNK):
        block = requests[start : start + CHUNK]
        counts = block["history_item"].list.len().to_numpy().astype(np.int64)
        if not counts.any():
            continue
        item, action, of, time = (
            block[name].explode(empty_as_null=False).to_numpy().astype(np.int64)
            for name in ("history_item", "history_action", "history_surface", "history_time_ms")
        )
        owner = np.repeat(np.arange(block.height), counts)
        hours = (block["timestamp_ms"].to_numpy()[owner] - time) / HOUR_MS
        happened = (action[:, None] - 1) >> np.arange(len(TASKS)) & 1
        weight = effect_of(happened) * world.carry[of - 1, surface] * np.exp(-hours / config.reinforcement_hours)
        effect = np.einsum("nd,nde->ne", weight[:, None] * world.vector[item - 1], world.transfer[of - 1])
        newer = np.cumsum(counts)[owner] - np.arange(owner.size)  # 1 for the newest event of a request
        for k, length in enumerate(lengths):
            read = np.flatnonzero(newer <= length)
            np.add.at(found[k, start : start + CHUNK], owner[read], effect[read])
    return config.reinforcement * np.tanh(found)


def cut_probabilities(
    config: SimulationConfig,
    world: World,
    dataset: Dataset,
    surface: str,
    days: tuple[str, ...],
    lengths: tuple[int, ...],
) -> pl.DataFrame:
    """True click probabilities, but for the effect of events older than the newest, as many as each length says.

    Returns:
        surface, request_id, candidate (int32) and p_LENGTH for each length, one row a candidate.

    Raises:
        DataError, SchemaError: no such surface or day, or no truths beside the log.
    """
    import polars as pl

    from pipeline.data.simulate.users import relative
    from pipeline.data.truth import read_truth
    from pipeline.schema import REQUEST_ID

    position = dataset.schema.surface_index(surface)
    files = [str(dataset.root / f.path) for p in dataset.partitions(surface, days) for f in p.files]
    names = ["history_item", "history_action", "history_surface", "history_time_ms"]
    requests = pl.read_parquet(files, columns=[REQUEST_ID, "timestamp_ms", "item", *names], hive_partitioning=False)
    *cuts, whole = reinforced(config, world, position, requests, (*lengths, np.iinfo(np.int64).max))
    counts = requests["item"].list.len().to_numpy().astype(np.int64)
    owner = np.repeat(np.arange(requests.height), counts)
    vector = world.vector[requests["item"].explode(empty_as_null=False).to_numpy() - 1]
    truth = pl.DataFrame(pl.from_arrow(read_truth(dataset, surface, days)))[TASK]
    p = truth.explode(empty_as_null=False).to_numpy().astype(np.float64)
    logit = np.log(p / (1 - p))

    def without(cut: np.ndarray) -> np.ndarray:
        lost = relative(cut - whole, config.topics)[owner]
        return 1 / (1 + np.exp(-logit - (lost * vector).sum(axis=1)))

    return pl.DataFrame(
        {
            "surface": pl.repeat(surface, owner.size, eager=True),
            REQUEST_ID: requests[REQUEST_ID].to_numpy()[owner],
            "candidate": (np.arange(owner.size) - (np.cumsum(counts) - counts)[owner]).astype(np.int32),
            **{f"p_{length}": without(cut) for length, cut in zip(lengths, cuts, strict=True)},
        }
    )


def history_length_figures(settings: Settings) -> dict[str, Any]:
    """`gap_closed` by number of events and surface: value and ends of its interval."""
    import polars as pl

    from pipeline.config import DaysConfig
    from pipeline.data.flat import impressions
    from pipeline.data.simulate import simulate
    from pipeline.data.simulate.world import make_world
    from pipeline.data.truth import with_truth
    from pipeline.evaluate.predictions import Predictions
    from pipeline.schema import REQUEST_ID
    from pipeline.train.days import split_days
    from pipeline.train.judge import trivial_predictions

    if settings.quick:
        settings = replace(settings, requests=1_500, lengths=(24, 768), resamples=20)
    config = replace(worlds(settings.requests)["default"], history=settings.whole, seed=settings.seed)
    with tempfile.TemporaryDirectory() as folder:
        dataset = simulate(Path(folder) / "log", config)
        days = split_days(dataset, DaysConfig(validation=1, test=2))
        surfaces = dataset.schema.surfaces
        flat = impressions(dataset, surfaces=surfaces, tasks=(TASK,), days=days.test, item="item").drop("item")
        rows = with_truth(flat.collect(), dataset, (TASK,)).with_columns(weight=pl.lit(1.0))
        oracle = Predictions.of(rows.with_columns(p_click=pl.col("truth_click")))
        trivial = trivial_predictions(oracle, dataset, days.train)
        figures, world = {}, make_world(config)
        parts = [cut_probabilities(config, world, dataset, s, days.test, settings.lengths) for s in surfaces]
        cuts = rows.join(pl.concat(parts), on=["surface", REQUEST_ID, "candidate"], how="left", maintain_order="left")
        for length in settings.lengths:
            reader = Predictions.of(cuts.select(*rows.columns, p_click=f"p_{length}"))
            figures[str(length)] = gap_closed(reader, trivial, oracle, resamples=settings.resamples)
    return {"gap_closed": figures}


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    report = Report("history_length", settings)
    report.finish(history_length_figures(settings))


if __name__ == "__main__":
    main()
