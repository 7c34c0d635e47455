"""A checkpoint of two ranks, resumed by one, then by three: every tensor as it was, every sample once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor

from pipeline.config import CheckpointConfig, ShardingConfig
from pipeline.data.logs import Dataset
from pipeline.data.simulate import SimulationConfig, simulate
from pipeline.train.checkpoint.reading import flat, tensors_of
from pipeline.train.sharding import joined
from pipeline.train.trainer import Trainer
from tests.distributed.ranks import run_ranks
from tests.train.runs import Recorder, parameters, tiny_config

CUTS = (3, 6)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("log") / "data"
    simulate(root, SimulationConfig.tiny())
    return root


def config(**changes: Any) -> Any:
    return replace(tiny_config(checkpoint=CheckpointConfig(steps=3, keep_newest=99)), **changes)


def leg(run: Any, data: Path, folder: Path, path: Path | None, leave_after: int | None) -> dict[str, Any]:
    """Train on this rank from a checkpoint, if there is one, and be told to leave before a step.

    Returns the tensors loaded, in parts with their offsets; the losses; and the requests of each step.
    """
    with joined() as ranks:
        recorder = Recorder()
        trainer = Trainer(run, Dataset.open(data), ranks, folder, recorder)
        loaded: dict[str, Any] = {}
        if path is not None:
            trainer.resume(path)
            loaded = {n: parts(v) for n, v in flat(tensors_of(trainer.model, trainer.optimizer)).items()}
        requests: list[list[int]] = []
        steps = trainer.steps

        def watched(*args: Any, **kwargs: Any) -> Any:
            for outputs in steps(*args, **kwargs):
                requests.append(outputs.batch.request_id[outputs.batch.request_id >= 0].tolist())
                yield outputs

        trainer.steps = watched  # type: ignore[method-assign]
        if leave_after is not None:
            trainer.config = replace(run, epochs=1)
            original = trainer.loader.batches

            def until(epoch: int, first_step: int = 0) -> Any:
                for step, batch in enumerate(original(epoch, first_step), first_step + 1):
                    trainer.supervision.leaving = step == leave_after
                    yield batch

            trainer.loader.batches = until  # type: ignore[method-assign]
        saved = trainer.train()
        assert trainer.stopped == (leave_after is not None)
        return {
            "loaded": loaded,
            "losses": recorder.losses() if recorder.steps else [],
            "requests": requests,
            "checkpoint": saved,
        }


def parts(value: Any) -> list[tuple[tuple[int, ...], np.ndarray]]:
    if isinstance(value, ShardedTensor):
        return [(tuple(s.metadata.shard_offsets), s.tensor.detach().cpu().numpy().copy()) for s in value.local_shards()]
    return [((0,) * value.dim(), value.detach().cpu().numpy().copy())]


def joined_parts(ranks: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Whole tensors from what all ranks loaded."""
    whole: dict[str, np.ndarray] = {}
    for name in sorted({n for rank in ranks for n in rank["loaded"]}):
        found = [part for rank in ranks for part in rank["loaded"].get(name, ())]
        shape = np.max([np.add(o, v.shape) for o, v in found], axis=0) if found[0][1].ndim else ()
        out = np.full(shape, np.nan, dtype=np.float64)
        for offsets, value in found:
            out[tuple(slice(o, o + n) for o, n in zip(offsets, value.shape, strict=True))] = value
        assert not np.isnan(out).any(), name
        whole[name] = out
    return whole


def test_two_ranks_then_one_then_three(data: Path, tmp_path: Path) -> None:
    row_wise = config(sharding=ShardingConfig(tables={"item": ("row_wise",)}))
    whole = leg(config(), data, tmp_path / "whole", None, None)
    two = run_ranks(leg, 2, row_wise, data, tmp_path / "a", None, CUTS[0])
    first = two[0]["checkpoint"]
    assert first.name == f"epoch-0-step-{CUTS[0]:08d}"
    one = leg(config(), data, tmp_path / "b", first, CUTS[1])
    second = one["checkpoint"]
    assert second.name == f"epoch-0-step-{CUTS[1]:08d}"
    three = run_ranks(leg, 3, row_wise, data, tmp_path / "c", second, None)

    # What one rank wrote, three ranks under another plan hold bit for bit, moments of the optimizers included.
    alone = leg(config(), data, tmp_path / "d", second, CUTS[1] + 1)
    expected, found = joined_parts([alone]), joined_parts(three)
    assert expected.keys() == found.keys()
    assert sum("momentum1" in n for n in found) >= 5
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)

    # Every request once, in the steps of the uninterrupted run; the losses are its losses.
    steps = [
        sorted(request for rank in ranks for request in rank["requests"][step])
        for ranks in (two, [one], three)
        for step in range(len(ranks[0]["requests"]))
    ]
    assert steps == [sorted(r) for r in whole["requests"]]
    losses = two[0]["losses"] + one["losses"] + three[0]["losses"]
    np.testing.assert_allclose(losses, whole["losses"], rtol=1e-4)


def test_two_ranks_resumed_by_two_are_the_same_bits(data: Path, tmp_path: Path) -> None:
    straight = run_ranks(leg, 2, config(), data, tmp_path / "a", None, None)
    cut = run_ranks(leg, 2, config(), data, tmp_path / "b", None, CUTS[0])
    rest = run_ranks(leg, 2, config(), data, tmp_path / "b", cut[0]["checkpoint"], None)
    assert cut[0]["losses"] + rest[0]["losses"] == straight[0]["losses"]
    first, second = parameters(straight[0]["checkpoint"]), parameters(rest[0]["checkpoint"])
    for name, value in first.items():
        assert torch.equal(torch.from_numpy(value), torch.from_numpy(second[name])), name
