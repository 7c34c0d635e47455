"""Batches hold what the files hold, each request exactly once, whatever the ranks and wherever a run was cut."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from pipeline.config import LoaderConfig
from pipeline.data.batch import Batch
from pipeline.data.layout import FeatureLayout, feature_layout
from pipeline.data.loader import Loader
from pipeline.data.logs import Dataset
from pipeline.data.writer import LogWriter
from pipeline.errors import ConfigError, DataError, SchemaError
from tests.data.logs import DAYS, SURFACES, request, schema, table, write_log

Rows = dict[tuple[str, int], dict[str, Any]]
INERT = -1  # request_id of what a rank gets that has no request in a step


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Rows]:
    return write_log(tmp_path_factory.mktemp("log") / "data", {"hf": 61, "sr": 24, "rp": 9})


def layout_of(dataset: Dataset, surfaces: tuple[str, ...] = SURFACES) -> FeatureLayout:
    return feature_layout(dataset.schema, surfaces=surfaces, tasks=dataset.schema.tasks)


def loader(dataset: Dataset, *, rank: int = 0, world_size: int = 1, **config: Any) -> Loader:
    config = {"requests_per_batch": 10, "lanes": 4, "window": 3, "prefetch_batches": 0, **config}
    return Loader(
        dataset,
        layout_of(dataset),
        LoaderConfig(**config),
        days=None,
        seed=3,
        rank=rank,
        world_size=world_size,
    )


def keys_of(batch: Batch) -> list[tuple[str, int]]:
    surfaces = [SURFACES[i] for i in batch.inputs.surface_of_request.tolist()]
    return list(zip(surfaces, batch.request_id.tolist(), strict=True))


def jagged(kjt: KeyedJaggedTensor, key: str) -> list[list[int]]:
    part = kjt[key]
    return [v.tolist() for v in torch.split(part.values(), part.lengths().tolist())]


def lists(values: torch.Tensor, lengths: torch.Tensor) -> list[list[float]]:
    return [v.tolist() for v in torch.split(values, lengths.tolist())]


def optional(value: Any) -> list[Any]:
    return [] if value is None else [value]


def same_number(found: float, value: float | None) -> bool:
    return math.isnan(found) if value is None else found == pytest.approx(value)


def test_batches_hold_the_rows_of_the_files(log: tuple[Dataset, Rows]) -> None:
    dataset, rows = log
    for batch in loader(dataset).batches(0):
        inputs, keys = batch.inputs, keys_of(batch)
        wanted = [rows[k] for k in keys]
        candidates = [(row, i) for row in wanted for i in range(len(row["item"]))]
        assert batch.user_id.tolist() == [row["user_id"] for row in wanted]
        assert jagged(inputs.request_ids, "user") == [[row["user"]] for row in wanted]
        assert jagged(inputs.request_ids, "country") == [optional(row["country"]) for row in wanted]
        assert jagged(inputs.request_ids, "query") == [row.get("query", []) for row in wanted]
        assert jagged(inputs.sequence_ids, "related_item") == [optional(row.get("related_item")) for row in wanted]
        assert jagged(inputs.sequence_ids, "history_item") == [row["history_item"] for row in wanted]
        assert jagged(inputs.sequence_ids, "item") == [row["item"] for row in wanted]
        assert inputs.sequence_ids["item"].values().tolist() == [row["item"][i] for row, i in candidates]
        assert jagged(inputs.candidate_ids, "topics") == [row["topics"][i] for row, i in candidates]
        assert inputs.candidate_counts.tolist() == [len(row["item"]) for row in wanted]
        assert [wanted[r]["request_id"] for r in inputs.request_of_candidate.tolist()] == [
            row["request_id"] for row, _ in candidates
        ]
        lengths = inputs.sequence_ids["history_item"].lengths()
        assert lists(inputs.history_action, lengths) == [row["history_action"] for row in wanted]
        assert lists(inputs.history_surface, lengths) == [row["history_surface"] for row in wanted]
        ages = [[(row["timestamp_ms"] - t) / 1000 for t in row["history_time_ms"]] for row in wanted]
        assert lists(inputs.history_age, lengths) == [pytest.approx(a, rel=1e-6) for a in ages]
        assert all(
            same_number(f, row["hour"]) for f, row in zip(inputs.request_numeric[:, 0].tolist(), wanted, strict=True)
        )
        assert all(
            same_number(found, row[name][i] if name in row else None)
            for j, name in enumerate(layout_of(dataset).candidate_numeric)
            for found, (row, i) in zip(inputs.candidate_numeric[:, j].tolist(), candidates, strict=True)
        )
        assert batch.labels[:, 0].tolist() == [row["click"][i] for row, i in candidates]
        assert batch.label_mask[:, 1].tolist() == [row["save"][i] is not None for row, i in candidates]
        assert batch.task_normalizer.tolist() == batch.label_mask.sum(0).tolist()


def test_rows_lie_surface_by_surface(log: tuple[Dataset, Rows]) -> None:
    for batch in loader(log[0]).batches(0):
        inputs = batch.inputs
        assert inputs.surface_of_request.tolist() == sorted(inputs.surface_of_request.tolist())
        counts = torch.bincount(inputs.surface_of_request, minlength=3)
        assert inputs.requests_per_surface == counts.tolist()
        per_surface = torch.bincount(inputs.surface_of_request[inputs.request_of_candidate], minlength=3)
        assert inputs.candidates_per_surface == per_surface.tolist()


def flat(value: Any) -> list[Any]:
    if isinstance(value, KeyedJaggedTensor):
        return [value.keys(), value.values().tolist(), value.lengths().tolist()]
    if isinstance(value, torch.Tensor):
        return [value.nan_to_num(-7.0).tolist()]
    return [value]


def content(batch: Batch) -> list[Any]:
    parts = [getattr(batch, f.name) for f in fields(batch) if f.name != "inputs"]
    parts += [getattr(batch.inputs, f.name) for f in fields(batch.inputs)]
    return [piece for part in parts for piece in flat(part)]


log_sizes = st.fixed_dictionaries({"hf": st.integers(1, 40), "sr": st.integers(0, 20), "rp": st.integers(0, 6)})
shares = st.none() | st.fixed_dictionaries({s: st.sampled_from([0.2, 1.0, 2.0]) for s in SURFACES})


@settings(max_examples=15, deadline=None)
@given(
    sizes=log_sizes,
    shares=shares,
    batch=st.integers(1, 12),
    before=st.integers(1, 4),
    after=st.integers(1, 4),
    share_done=st.floats(0, 1),
    epoch=st.integers(0, 1),
)
def test_exactly_once_through_a_kill_and_another_number_of_ranks(
    sizes: dict[str, int],
    shares: dict[str, float] | None,
    batch: int,
    before: int,
    after: int,
    share_done: float,
    epoch: int,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        dataset, rows = write_log(Path(folder) / "data", sizes, row_group_requests=4)

        def run(world_size: int, first: int, last: int | None) -> list[Counter[tuple[str, int]]]:
            """What each step sees, over all ranks."""
            steps: list[Counter[tuple[str, int]]] = []
            for rank in range(world_size):
                one = loader(
                    dataset, rank=rank, world_size=world_size, requests_per_batch=batch, surface_weights=shares
                )
                stop = None if last is None else last - first
                made = [
                    Counter(k for k in keys_of(b) if k[1] != INERT) for b in islice(one.batches(epoch, first), stop)
                ]
                if rank == 0:
                    steps = made
                else:
                    assert len(made) == len(steps)
                    steps = [a + b for a, b in zip(steps, made, strict=True)]
            return steps

        whole = run(1, 0, None)
        killed = round(share_done * len(whole))
        assert run(before, 0, killed) + run(after, killed, None) == whole
        assert sum(whole, Counter()) == Counter(rows.keys())


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_resumed_rank_makes_the_very_same_batches(log: tuple[Dataset, Rows], prefetch: int) -> None:
    for rank in range(2):
        one = loader(log[0], rank=rank, world_size=2, prefetch_batches=prefetch)
        whole = [content(b) for b in one.batches(1)]
        assert len(whole) == one.steps
        assert [content(b) for b in one.batches(1, 4)] == whole[4:]


@settings(max_examples=8, deadline=None)
@given(
    sizes=log_sizes,
    shares=shares,
    batch=st.integers(1, 12),
    world_size=st.integers(1, 4),
    share_done=st.floats(0, 1),
    exhaustion=st.sampled_from(["drop_out", "stop", "repeat"]),
)
def test_any_log_killed_anywhere_goes_on_with_the_very_same_batches(
    sizes: dict[str, int],
    shares: dict[str, float] | None,
    batch: int,
    world_size: int,
    share_done: float,
    exhaustion: str,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        dataset, _ = write_log(Path(folder) / "data", sizes, row_group_requests=4)
        for rank in range(world_size):
            one, other = (
                loader(
                    dataset,
                    rank=rank,
                    world_size=world_size,
                    requests_per_batch=batch,
                    surface_weights=shares,
                    exhaustion=exhaustion,
                )
                for _ in range(2)
            )
            whole = [content(b) for b in one.batches(0)]
            killed = round(share_done * one.steps)
            assert [content(b) for b in other.batches(0, killed)] == whole[killed:]


def test_repeat_starts_a_surface_again_in_another_order(log: tuple[Dataset, Rows]) -> None:
    one = loader(log[0], surface_weights=dict.fromkeys(SURFACES, 1.0), exhaustion="repeat")
    seen = [k for b in one.batches(0) for k in keys_of(b)]
    related = [number for surface, number in seen if surface == "rp"]
    largest = Counter(number for surface, number in seen if surface == "hf")
    assert set(largest) == set(range(61))
    assert largest.total() - 61 < 4  # the last batch is filled from the next pass
    passes = [related[i : i + 9] for i in range(0, len(related), 9)]
    assert all(sorted(p) == list(range(9)) for p in passes[:-1])
    assert passes[0] != passes[1]


def test_history_is_cut_to_the_newest_events(log: tuple[Dataset, Rows]) -> None:
    dataset, rows = log
    for batch in loader(dataset, history_length=2).batches(0):
        wanted = [rows[k]["history_item"][-2:] for k in keys_of(batch)]
        assert jagged(batch.inputs.sequence_ids, "history_item") == wanted
        assert batch.inputs.history_slots.numel() <= 2


def test_a_surface_alone_reads_only_its_features(log: tuple[Dataset, Rows]) -> None:
    dataset, _ = log
    assert "query" not in layout_of(dataset, ("hf",)).features
    assert layout_of(dataset, ("rp",)).request_sequences == ("related_item",)


def test_an_unknown_surface_names_the_nearest(log: tuple[Dataset, Rows]) -> None:
    with pytest.raises(SchemaError, match="unknown surface 'hff'; did you mean 'hf'"):
        layout_of(log[0], ("hff", "sr"))
    with pytest.raises(ConfigError, match="unknown surface 'hff'; did you mean 'hf'"):
        loader(log[0], surface_weights={"hff": 1.0, "sr": 1.0, "rp": 1.0})


def test_weights_come_with_the_rows(tmp_path: Path) -> None:
    dataset, rows = write_log(tmp_path / "data", {"hf": 20, "sr": 5, "rp": 3}, weighted=True)
    for batch in loader(dataset).batches(0):
        wanted = [w for k in keys_of(batch) for w in rows[k]["weight"]]
        assert batch.weights.tolist() == pytest.approx(wanted)


def test_days_are_chosen(log: tuple[Dataset, Rows]) -> None:
    one = Loader(log[0], layout_of(log[0]), LoaderConfig(), days=(DAYS[1],), seed=0)
    assert one.sizes == {"hf": 21, "sr": 8, "rp": 3}
    with pytest.raises(DataError, match="unknown day '2026-01-09'"):
        Loader(log[0], layout_of(log[0]), LoaderConfig(), days=("2026-01-09",), seed=0)


def test_more_ranks_than_lanes_is_an_error(log: tuple[Dataset, Rows]) -> None:
    with pytest.raises(ConfigError, match="raise loader\\.lanes to at least 5"):
        loader(log[0], rank=0, world_size=5)


def test_leaving_early_ends_the_thread(log: tuple[Dataset, Rows]) -> None:
    import threading

    batches = loader(log[0], prefetch_batches=1).batches(0)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t.name == "trefoil-loader"]


@pytest.mark.parametrize(("size", "width"), [(2**31 - 1, torch.int32), (2**31, torch.int64)])
def test_ids_have_32_bits_where_all_fit_and_64_else(tmp_path: Path, size: int, width: torch.dtype) -> None:
    of = schema()
    users = replace(of.vocabularies[0], size=size)
    of = replace(of, vocabularies=(users, *of.vocabularies[1:]))
    rows = [request(np.random.default_rng(i), "hf", i, of) | {"user": size - 1 - i} for i in range(8)]
    writer = LogWriter(tmp_path / "data", of)
    writer.write("hf", DAYS[0], table(rows, "hf", of))
    (batch,) = loader(writer.close({})).batches(0)
    inputs = batch.inputs
    assert {k.values().dtype for k in (inputs.request_ids, inputs.candidate_ids, inputs.sequence_ids)} == {width}
    found = dict(zip(batch.request_id.tolist(), inputs.request_ids["user"].values().tolist(), strict=True))
    assert found == {i: size - 1 - i for i in range(8)}
