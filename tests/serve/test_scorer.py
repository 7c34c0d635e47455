"""Scores: the trainer's, in any order, in any form of rows; and one clear error for each kind of bad row."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data.block import RequestBlock
from pipeline.data.logs import Dataset
from pipeline.errors import DataError
from pipeline.schema import REQUEST_ID, Level
from pipeline.serve.example import made_up_requests
from pipeline.serve.parity import held_out
from pipeline.serve.rows import to_requests
from pipeline.serve.runtime import load_program
from pipeline.serve.scorer import Scorer, bounded
from pipeline.serve.trained import TrainedModel
from pipeline.train import checkpoint as checkpoints
from tests.serve.test_export import Artifacts


def test_a_program_moves_to_another_device_with_all_that_it_checks(artifact: Artifacts) -> None:
    """No GPU is needed: "meta" is a device too, and refuses tensors of another as a GPU would."""
    info = artifact("sr", "int8")
    program = load_program(info.path, info.signature, device=torch.device("meta"))
    block = to_requests(
        made_up_requests(info.signature.schema, "sr", candidates=[2, 3], history=[4, 0]), info.signature, "rows"
    ).block
    scores = program({n: t.to("meta") for n, t in info.signature.tensors.tensors(block).items()})
    assert (scores.device.type, tuple(scores.shape)) == ("meta", (5, 2))


@pytest.fixture(scope="module")
def rows(log: Dataset) -> pa.Table:
    """Held-out grouped rows of Search, with labels and all."""
    return held_out(log, "sr", log.days[-1:], 10_000)


def flat(table: pa.Table, scorer: Scorer) -> pl.DataFrame:
    """The same candidates, one a row, without labels."""
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    candidate = list(scorer.signature.columns(Level.CANDIDATE))
    return frame.drop("click", "long_click", "save", "hide").explode(candidate)


def matrix(scores: pa.Table) -> np.ndarray:
    """[C, T] of either form."""
    return np.stack(
        [(c.combine_chunks().flatten() if pa.types.is_list(c.type) else c).to_numpy() for c in scores.columns], axis=1
    )


def test_scores_are_the_trainers(scorer: Scorer, checkpoint: Path, rows: pa.Table) -> None:
    block = to_requests(rows, scorer.signature, "rows").block
    trainer = TrainedModel(checkpoint, checkpoints.read_state(checkpoint)).scores("sr", block)
    scores = scorer.score(rows)
    assert scores.column_names == ["click", "save"]
    assert scores.num_rows == rows.num_rows
    np.testing.assert_allclose(matrix(scores), trainer, atol=1e-6)
    assert np.ptp(trainer[:, 0]) > 0.01, "a model that says the same of all proves nothing"


def test_flat_rows_score_as_grouped_ones(scorer: Scorer, rows: pa.Table) -> None:
    expected = matrix(scorer.score(rows))
    frame = flat(rows, scorer)
    for given_rows in (frame, frame.to_arrow(), frame.to_pandas(), frame.drop(REQUEST_ID)):
        scores = scorer.score(given_rows)
        assert scores.schema.types == [pa.float32(), pa.float32()]
        np.testing.assert_allclose(matrix(scores), expected, atol=1e-6)


def test_broadcast_scores_as_plain(scorer: Scorer, rows: pa.Table) -> None:
    frame = flat(rows, scorer)
    alone = frame.with_columns(pl.int_range(pl.len(), dtype=pl.Int64).alias(REQUEST_ID))
    np.testing.assert_allclose(matrix(scorer.score(alone)), matrix(scorer.score(frame)), atol=1e-6)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1), with_id=st.booleans(), share=st.floats(0.05, 1.0))
def test_order_is_the_callers(
    scorer: Scorer, small_bound: Scorer, rows: pa.Table, seed: int, with_id: bool, share: float
) -> None:
    frame = flat(rows, scorer)
    chosen = np.random.default_rng(seed).permutation(frame.height)[: max(1, int(share * frame.height))]
    expected = matrix(scorer.score(frame))[chosen]
    shuffled = frame[chosen] if with_id else frame[chosen].drop(REQUEST_ID)
    np.testing.assert_allclose(matrix(small_bound.score(shuffled)), expected, atol=1e-6)


def test_more_requests_than_the_bound(scorer: Scorer, small_bound: Scorer, rows: pa.Table) -> None:
    np.testing.assert_allclose(matrix(small_bound.score(rows)), matrix(scorer.score(rows)), atol=1e-6)
    strict = Scorer(small_bound.signature, small_bound.program, past_limit="refuse")
    with pytest.raises(DataError, match=rf"{rows.num_rows} requests are more than the artifact's bound of 7"):
        strict.score(rows)


@pytest.mark.parametrize(
    ("candidates", "history"),
    [
        ([1], [1]),
        ([1], [0]),
        ([200], [10]),
        ([3] * 16, [10] * 16),
        ([0, 2, 0], [0, 3, 1]),
        ([0], [5]),
        ([], []),
        ([2], [40]),
    ],
)
def test_every_shape(scorer: Scorer, checkpoint: Path, candidates: list[int], history: list[int]) -> None:
    """One request, one candidate, none, no history, a history longer than the model reads."""
    signature = scorer.signature
    table = made_up_requests(signature.schema, "sr", candidates=candidates, history=history)
    scores = scorer.score(table)
    assert [len(x) for x in scores["click"].to_pylist()] == candidates
    if sum(candidates):
        block = to_requests(table, signature, "rows").block
        trainer = TrainedModel(checkpoint, checkpoints.read_state(checkpoint)).scores("sr", block)
        np.testing.assert_allclose(matrix(scores), trainer, atol=1e-6)


@pytest.mark.parametrize("counts", [[10_000], [1, 10_000, 1], [3] * 40, [700, 0, 5]])
def test_ten_thousand_candidates_run_in_parts(scorer: Scorer, counts: list[int]) -> None:
    """Parts of one request score as the whole, in order; flat rows too."""
    table = made_up_requests(scorer.signature.schema, "sr", candidates=counts, history=[7] * len(counts))
    whole = Scorer(replace(scorer.signature, max_candidates=10**6), scorer.program)
    parts = Scorer(replace(scorer.signature, max_candidates=512), scorer.program)
    expected = matrix(whole.score(table))
    assert expected.shape == (sum(counts), 2)
    np.testing.assert_allclose(matrix(parts.score(table)), expected, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), max_size=30),
    max_requests=st.integers(1, 12),
    max_candidates=st.integers(1, 50),
)
def test_parts_are_within_the_bounds_and_lose_nothing(
    counts: list[int], max_requests: int, max_candidates: int
) -> None:
    entries = torch.arange(sum(counts))
    rows = torch.arange(len(counts))
    nothing = torch.zeros(len(counts), dtype=torch.int64)
    block = RequestBlock({"row": rows}, {}, torch.tensor(counts, dtype=torch.int64), {"e": entries}, {}, nothing, {})
    parts = list(bounded(block, max_requests, max_candidates))
    for part in parts:
        assert len(part) <= max_requests
        most = int(part.candidate_counts.max()) if len(part) else 0
        assert len(part) * most <= max_candidates
    owner = torch.cat([p.scalars["row"].repeat_interleave(p.candidate_counts) for p in parts] or [rows[:0]])
    assert torch.cat([p.candidates["e"] for p in parts] or [entries]).tolist() == entries.tolist()
    assert owner.tolist() == rows.repeat_interleave(torch.tensor(counts, dtype=torch.int64)).tolist()


def test_warm_up_changes_no_score(scorer: Scorer, rows: pa.Table) -> None:
    expected = matrix(scorer.score(rows))
    scorer.warm_up()
    np.testing.assert_array_equal(matrix(scorer.score(rows)), expected)


def test_only_the_newest_events_count(scorer: Scorer) -> None:
    signature = scorer.signature
    assert signature.history_length == 10
    long = made_up_requests(signature.schema, "sr", candidates=[4], history=[14])
    short = long
    for name in signature.columns(Level.HISTORY):
        short = short.set_column(
            short.column_names.index(name), name, pa.array([long[name][0].as_py()[-10:]]).cast(long[name].type)
        )
    np.testing.assert_array_equal(matrix(scorer.score(long)), matrix(scorer.score(short)))


def test_columns_that_are_not_read_do_not_matter(scorer: Scorer, rows: pa.Table) -> None:
    expected = matrix(scorer.score(rows))
    needed = [n for level in Level for n in scorer.signature.columns(level)]
    assert "related_item" not in needed, "Related Pins' own feature"
    more = rows.select(needed).append_column("related_item", pa.array(["x"] * rows.num_rows))
    np.testing.assert_array_equal(matrix(scorer.score(more)), expected)


def test_an_absent_value_is_not_id_0(scorer: Scorer) -> None:
    table = made_up_requests(scorer.signature.schema, "sr", candidates=[3], history=[2])
    at = table.column_names.index("device")
    zero, absent = (table.set_column(at, "device", pa.array([v], pa.int64())) for v in (0, None))
    assert np.abs(matrix(scorer.score(zero)) - matrix(scorer.score(absent))).max() > 1e-6


def test_a_parquet_file_and_other_widths_of_numbers(scorer: Scorer, rows: pa.Table, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(rows, path)
    expected = matrix(scorer.score(rows))
    np.testing.assert_array_equal(matrix(scorer.score(path)), expected)
    narrow = rows.set_column(rows.column_names.index("user"), "user", rows["user"].cast(pa.int32()))
    wide = narrow.set_column(narrow.column_names.index("price"), "price", narrow["price"].cast(pa.list_(pa.float64())))
    np.testing.assert_array_equal(matrix(scorer.score(wide)), expected)


def test_pandas_nan_means_absent(scorer: Scorer, rows: pa.Table) -> None:
    absent = pl.when(pl.col(REQUEST_ID) % 2 == 0).then(None).otherwise(pl.col("device"))
    frame = flat(rows, scorer).with_columns(absent.alias("device"))
    pandas = frame.to_pandas()
    assert pandas["device"].isna().any()
    assert pandas["device"].dtype == np.float64
    np.testing.assert_allclose(matrix(scorer.score(pandas)), matrix(scorer.score(frame)), atol=1e-6)


def test_threads_share_a_scorer(scorer: Scorer, rows: pa.Table) -> None:
    parts = [rows.slice(i, 4) for i in range(0, rows.num_rows, 4)]
    expected = [matrix(scorer.score(part)) for part in parts]
    with ThreadPoolExecutor(4) as pool:
        for got, want in zip(pool.map(scorer.score, parts), expected, strict=True):
            np.testing.assert_array_equal(matrix(got), want)


def edit(name: str, change: Callable[[list], list], of: pa.DataType | None = None) -> Callable[[pa.Table], pa.Table]:
    """A change to one column's values."""

    def apply(table: pa.Table) -> pa.Table:
        values = pa.array(change(table[name].to_pylist()), of or table[name].type)
        return table.set_column(table.column_names.index(name), name, values)

    return apply


def first_in_list(value: object) -> Callable[[list], list]:
    return lambda lists: [[value, *lists[0][1:]], *lists[1:]]


BAD_ROWS = [
    (lambda t: t.drop_columns(["item"]), "wants a column that is not there; unknown column 'item'.*column item"),
    (edit("user", lambda v: [str(x) for x in v], pa.string()), "type string, it must be int64.*column user"),
    (edit("user", lambda v: [0.5, *v[1:]], pa.float64()), "values that are no int64.*column user"),
    (edit("price", first_in_list(float("nan"))), "NaN or infinity; null is the way.*column price"),
    (edit("item", first_in_list(10**6)), r"holds 1000000; ids of vocabulary 'item' lie in \[0, 81\).*column item"),
    (edit("item", first_in_list(-1)), "holds -1; ids of vocabulary 'item'.*column item"),
    (edit("item", first_in_list(None)), "a candidate lacks its id.*column item"),
    (edit("history_action", first_in_list(100)), "holds 100; codes lie in.*column history_action"),
    (edit("price", lambda v: [v[0][1:], *v[1:]]), "lists of a row must have equal lengths.*column price"),
    (edit("price", lambda v: [None, *v[1:]]), "null lists.*column price"),
    (edit("timestamp_ms", lambda v: [0, *v[1:]]), "the history leaks the future"),
    (edit("item", lambda v: [0] * len(v), pa.int64()), "."),
]


@pytest.mark.parametrize(("change", "message"), BAD_ROWS)
def test_bad_grouped_rows(scorer: Scorer, change: Callable[[pa.Table], pa.Table], message: str) -> None:
    table = made_up_requests(scorer.signature.schema, "sr", candidates=[3, 2], history=[2, 4])
    with pytest.raises(DataError, match=message):
        scorer.score(change(table))


def test_bad_flat_rows(scorer: Scorer, rows: pa.Table) -> None:
    frame = flat(rows, scorer)
    assert frame[REQUEST_ID][0] == frame[REQUEST_ID][1]
    other = pl.when(pl.int_range(pl.len()) == 1).then(1 - pl.col("device").clip(0, 1)).otherwise(pl.col("device"))
    with pytest.raises(DataError, match=r"rows 0 and 1 have the same request_id .* column device"):
        scorer.score(frame.with_columns(other.alias("device")))
    with pytest.raises(DataError, match=r"rows without a request.*column request_id"):
        scorer.score(frame.with_columns(pl.lit(None, pl.Int64).alias(REQUEST_ID)))


def test_not_rows_at_all(scorer: Scorer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="rows are a list; give an Arrow table"):
        scorer.score([1, 2])  # type: ignore[arg-type]
    with pytest.raises(DataError, match="there is no such file"):
        scorer.score(tmp_path / "none.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(DataError, match="not readable Parquet"):
        scorer.score(tmp_path / "bad.parquet")
    with pytest.raises(DataError, match="values of several types"):
        scorer.score(pd.DataFrame({"user": [1, "x"]}))


def test_flat_rows_without_a_row(scorer: Scorer, rows: pa.Table) -> None:
    scores = scorer.score(flat(rows, scorer).clear())
    assert scores.num_rows == 0
    assert scores.schema.types == [pa.float32(), pa.float32()]
