"""Very long requests are split or cut, never silently; memory and waiting are told."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import LoaderConfig
from pipeline.data.assemble import join_batch, prepare
from pipeline.data.block import Jagged, block_from_arrow, take_rows
from pipeline.data.layout import feature_layout
from pipeline.data.loader import Loader
from pipeline.data.logs import Dataset
from pipeline.data.simulate import SimulationConfig, simulate
from tests.data.logs import SURFACES, request, schema, table, write_log
from tests.data.test_loader import content, keys_of, lists

Rows = dict[tuple[str, int], dict[str, Any]]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Rows]:
    return write_log(tmp_path_factory.mktemp("log") / "data", {"hf": 61, "sr": 24, "rp": 9})


def loader(dataset: Dataset, *, rank: int = 0, world_size: int = 1, **config: Any) -> Loader:
    return Loader(
        dataset,
        feature_layout(dataset.schema, surfaces=SURFACES, tasks=dataset.schema.tasks),
        LoaderConfig(**{"requests_per_batch": 10, "lanes": 4, "window": 3, "prefetch_batches": 0, **config}),
        days=None,
        seed=3,
        rank=rank,
        world_size=world_size,
    )


@given(
    rows=st.lists(st.lists(st.integers(0, 99), max_size=4), min_size=1, max_size=6),
    taken=st.lists(st.integers(0, 5), max_size=9),
    dtype=st.sampled_from([torch.int8, torch.int32, torch.int64, torch.float32]),
    width=st.integers(0, 3),
)
def test_rows_are_taken_as_a_loop_would(rows: list[list[int]], taken: list[int], dtype: Any, width: int) -> None:
    taken = [t % len(rows) for t in taken]
    flat = torch.tensor([v for row in rows for v in row], dtype=dtype)
    lengths, index = torch.tensor([len(r) for r in rows]), torch.tensor(taken, dtype=torch.int32)
    wanted = [v for t in taken for v in rows[t]]
    assert take_rows(flat, lengths, index).tolist() == wanted
    matrix = flat[:, None].repeat(1, width)
    assert take_rows(matrix, lengths, index).tolist() == [[v] * width for v in wanted]
    assert lists(*vars(Jagged(flat, lengths).take(index)).values()) == [rows[t] for t in taken]


def test_a_split_request_keeps_its_candidates_and_repeats_the_rest(log: tuple[Dataset, Rows]) -> None:
    dataset, rows = log
    one, plain = loader(dataset, max_candidates=2), loader(dataset)
    divided = 0
    for batch, whole in zip(one.batches(0), plain.batches(0), strict=True):
        inputs, keys = batch.inputs, keys_of(batch)
        assert inputs.candidate_counts.max() <= 2
        assert sorted(set(keys)) == sorted(keys_of(whole))  # the same requests in the same batch
        assert batch.labels.tolist() == whole.labels.tolist()  # the same candidates in the same order
        assert batch.weights.tolist() == whole.weights.tolist()
        for key in ("item", "topics"):
            part = "sequence_ids" if key == "item" else "candidate_ids"
            assert getattr(inputs, part)[key].values().tolist() == getattr(whole.inputs, part)[key].values().tolist()
        history = inputs.sequence_ids["history_item"]
        assert lists(history.values(), history.lengths()) == [rows[k]["history_item"] for k in keys]
        owners = [keys[r] for r in inputs.request_of_candidate.tolist()]
        assert owners == [keys_of(whole)[r] for r in whole.inputs.request_of_candidate.tolist()]
        divided += len(keys) - len(set(keys))
    assert divided == sum(len(row["item"]) == 3 for row in rows.values()) > 0
    assert one.left_out.candidates == 0


def test_capped_requests_keep_their_first_candidates_and_the_rest_is_counted(log: tuple[Dataset, Rows]) -> None:
    dataset, rows = log
    one = loader(dataset, max_candidates=2, past_max_candidates="cap")
    for batch in one.batches(0):
        keys = keys_of(batch)
        counts = batch.inputs.candidate_counts
        assert lists(batch.inputs.sequence_ids["item"].values(), counts) == [rows[k]["item"][:2] for k in keys]
        assert batch.labels[:, 0].tolist() == [v for k in keys for v in rows[k]["click"][:2]]
        topics = batch.inputs.candidate_ids["topics"]
        wanted = [t for k in keys for t in rows[k]["topics"][:2]]
        assert lists(topics.values(), topics.lengths()) == wanted
    assert one.left_out.candidates == sum(max(len(row["item"]) - 2, 0) for row in rows.values()) > 0


def test_resuming_a_split_epoch_makes_the_very_same_batches(log: tuple[Dataset, Rows]) -> None:
    for rank in range(2):
        one = loader(log[0], max_candidates=1, rank=rank, world_size=2)
        whole = [content(b) for b in one.batches(1)]
        assert [content(b) for b in one.batches(1, 4)] == whole[4:]


@given(cut=st.integers(0, 9), narrow=st.booleans())
def test_preparing_whole_or_in_parts_makes_the_same_batch(cut: int, narrow: bool) -> None:
    import numpy as np

    of, rng = schema(), np.random.default_rng(cut)
    layout = feature_layout(of, surfaces=("sr",), tasks=of.tasks)
    block = block_from_arrow(table([request(rng, "sr", i, of) for i in range(9)], "sr", of), of)
    prepared = prepare(block, layout, torch.int32 if narrow else torch.int64)
    parts = [prepared.slice(0, cut), prepared.slice(cut, 9)]
    joined = join_batch([type(prepared).cat(parts)], layout)
    assert content(joined) == content(join_batch([prepare(block, layout)], layout))


def test_a_rank_without_requests_gets_an_inert_one(tmp_path: Path) -> None:
    dataset, rows = write_log(tmp_path / "data", {"hf": 5, "sr": 1, "rp": 1})
    inert = 0
    for rank in range(3):
        for batch in loader(dataset, rank=rank, world_size=3, requests_per_batch=2).batches(0):
            if batch.request_id.tolist() == [-1]:
                inert += 1
                assert batch.labels.shape == (0, 2)
                assert batch.inputs.candidate_counts.tolist() == [0]
                assert batch.inputs.sequence_ids.values().numel() == 0
                assert batch.inputs.request_ids.values().numel() == 0
                assert batch.task_normalizer.tolist() == [0.0, 0.0]
            else:
                assert all(k in rows for k in keys_of(batch))
    assert inert > 0


def test_what_is_held_stays_within_a_block_and_its_row_groups(tmp_path: Path) -> None:
    dataset, _ = write_log(tmp_path / "data", {"hf": 400, "sr": 0, "rp": 0}, row_group_requests=5)
    whole = loader(dataset, lanes=4, window=100)
    next(iter(whole.batches(0)))
    one = loader(dataset, lanes=4, window=5)
    held = []
    for _ in one.batches(0):
        held.append(one.bytes)
    per_request = whole.bytes / 400
    # A block of 4 lanes x 5 rows, and of each lane at most two row groups of 5, some requests larger than others.
    assert max(held) < 2 * (20 + 40) * per_request
    assert max(held[len(held) // 2 :]) < 1.5 * max(held[: len(held) // 2])


@pytest.mark.parametrize("prefetch", [0, 2])
def test_waiting_is_what_the_consumer_waited(log: tuple[Dataset, Rows], prefetch: int) -> None:
    one = loader(log[0], prefetch_batches=prefetch)
    start, working = time.perf_counter(), 0.0
    for _ in one.batches(0):
        before = time.perf_counter()
        time.sleep(0.005)
        working += time.perf_counter() - before
    passed = time.perf_counter() - start
    assert 0 < one.waited_s <= passed - working + 1e-6
    assert one.waited_s > 0.5 * (passed - working)


def test_grouped_logs_hold_a_third_of_the_bytes_of_flat_ones(tmp_path: Path) -> None:
    from benchmarks.loader import flat_over_grouped

    config = SimulationConfig.tiny(requests=300, candidates=8, candidate_spread=0, history=100)
    dataset = simulate(tmp_path / "log", config)
    layout = feature_layout(dataset.schema, surfaces=dataset.schema.surfaces, tasks=dataset.schema.tasks)
    found = flat_over_grouped(dataset, layout, tmp_path / "flat")
    assert 3 < found["flat_over_grouped_decoded_bytes"] < 8  # no more than the candidates of a request
