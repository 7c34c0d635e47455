"""Event embedding and encoder: against a loop, and what must not change them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from components.attention import MeanHistory
from components.cross import CrossProjection
from components.history import MAX_AGE_SECONDS, EventEmbedding, HistoryBlock, HistoryEncoder
from components.numeric import NumericFeatures
from components.ragged import JaggedRows, one_hot
from tests.components.batches import DIM, HISTORY_KEYS, WIDTH, make_embeddings, make_inputs

KEYS = dict.fromkeys(HISTORY_KEYS, DIM)


def make_events(**arguments: Any) -> EventEmbedding:
    return EventEmbedding(sequences=KEYS, width=WIDTH, actions=5, surfaces=4, **arguments)


def test_event_is_the_sum_of_its_parts() -> None:
    torch.manual_seed(0)
    block = make_events(numeric=NumericFeatures(mean=[0.0] * 2, std=[1.0] * 2))
    inputs = make_inputs(candidates=([1, 1],), histories=[2, 1], surfaces=("hf",))
    sequences = make_embeddings()(inputs).sequences
    assert sequences is not None
    events = block(sequences, inputs)
    assert events.shape == (3, WIDTH)
    numbers = NumericFeatures(mean=[0.0] * 2, std=[1.0] * 2)(inputs.history_numeric)
    for e in range(3):
        ids = torch.cat([*(sequences[key].values()[e] for key in HISTORY_KEYS), numbers[e]])
        bucket = int(math.log1p(inputs.history_age[e]) / math.log1p(MAX_AGE_SECONDS) * 31)
        want = block.project(ids) + block.action.weight[inputs.history_action[e]]
        want = want + block.surface.weight[inputs.history_surface[e]] + block.age.weight[bucket]
        assert_close(events[e], want, atol=1e-5, rtol=1e-5)


def test_age_buckets_grow_with_age_and_end() -> None:
    block = make_events(age_buckets=8)
    ages = torch.tensor([0.0, 1.0, 60.0, 3600.0, 86400.0, 30 * 86400.0, MAX_AGE_SECONDS, 1e12])
    buckets = block.age_bucket(ages)
    assert buckets.tolist() == sorted(buckets.tolist())
    assert (buckets[0], buckets[-2], buckets[-1]) == (0, 7, 7)
    assert block.age_bucket(torch.tensor([-5.0])).tolist() == [0]


def slow_encoder(encoder: HistoryEncoder, events: Tensor) -> Tensor:
    """One history [n, D], without padding, one query at a time."""
    x = torch.stack([e + encoder.position.weight[len(events) - 1 - i] for i, e in enumerate(events)])
    for layer in encoder.layers:
        normed = layer.norm_attention(x)
        q, k, v = layer.qkv(normed).chunk(3, dim=-1)
        width = q.shape[1] // layer.heads
        rows = []
        for i in range(len(x)):
            seen = i + 1 if encoder.causal else len(x)
            heads = []
            for h in range(layer.heads):
                cut = slice(h * width, (h + 1) * width)
                weights = torch.stack([q[i, cut] @ k[j, cut] / math.sqrt(width) for j in range(seen)]).softmax(0)
                heads.append(sum((weights[j] * v[j, cut] for j in range(seen)), torch.zeros(width)))
            rows.append(layer.out(torch.cat(heads)))
        x = x + torch.stack(rows)
        x = x + layer.feed(layer.norm_feed(x))
    return encoder.norm(x)


def encode(encoder: HistoryEncoder, events: Tensor, lengths: Tensor, slots: Tensor) -> Tensor:
    """The encoder on padded events [R, L, D]: zeros behind the last of a row."""
    rows = JaggedRows(lengths, values=int(lengths.sum()), slots=len(slots))
    return rows.pad(encoder(rows.unpad(events), lengths, slots))


@pytest.mark.parametrize("causal", [True, False])
def test_encoder_equals_the_loop(causal: bool) -> None:
    torch.manual_seed(0)
    encoder = HistoryEncoder(width=8, layers=2, heads=2, max_length=8, causal=causal)
    events, lengths = torch.randn(3, 5, 8), torch.tensor([5, 0, 2])
    events[1], events[2, 2:] = 0.0, 0.0
    got = encode(encoder, events, lengths, torch.arange(5))
    assert_close(got[0], slow_encoder(encoder, events[0]), atol=1e-5, rtol=1e-4)
    assert_close(got[2, :2], slow_encoder(encoder, events[2, :2]), atol=1e-5, rtol=1e-4)
    assert not got[1].any()
    assert not got[2, 2:].any()


@pytest.mark.parametrize("causal", [True, False])
def test_padding_changes_nothing_whatever_stands_there(causal: bool) -> None:
    encoder = HistoryEncoder(width=8, layers=2, heads=2, causal=causal)
    events, lengths = torch.randn(2, 3, 8), torch.tensor([3, 2])
    want = encode(encoder, events, lengths, torch.arange(3))
    longer = torch.cat([events, torch.full((2, 4, 8), 1e3)], dim=1)
    got = encode(encoder, longer, lengths, torch.arange(7))
    assert_close(got[:, :3], want, atol=1e-5, rtol=1e-4)
    assert not got[:, 3:].any()


def test_causal_events_do_not_see_newer_ones() -> None:
    encoder = HistoryEncoder(width=8, layers=2, heads=2)
    events = torch.randn(1, 4, 8, requires_grad=True)
    encode(encoder, events, torch.tensor([4]), torch.arange(4))[0, 1, 0].backward()
    assert events.grad is not None
    assert events.grad[0, :2].any(dim=1).all()
    assert not events.grad[0, 2:].any()


def test_dropping_old_events_does_not_shift_positions() -> None:
    encoder = HistoryEncoder(width=8, layers=1, heads=2)
    for parameter in encoder.layers.parameters():  # bare positions are left
        torch.nn.init.zeros_(parameter)
    events = torch.randn(1, 6, 8)
    full = encode(encoder, events, torch.tensor([6]), torch.arange(6))
    kept = encode(encoder, events[:, 2:], torch.tensor([4]), torch.arange(4))
    assert_close(kept, full[:, 2:])


def test_histories_beyond_the_positions_share_the_last() -> None:
    encoder = HistoryEncoder(width=8, layers=1, heads=2, max_length=2)
    events = torch.randn(1, 3, 8)
    for parameter in encoder.layers.parameters():
        torch.nn.init.zeros_(parameter)
    want = encoder.norm(events[0] + encoder.position.weight[[1, 1, 0]])
    assert_close(encode(encoder, events, torch.tensor([3]), torch.arange(3))[0], want)


@pytest.mark.parametrize("causal", [True, False])
def test_empty_histories_give_finite_gradients(causal: bool) -> None:
    encoder = HistoryEncoder(width=8, layers=2, heads=2, causal=causal)
    events = torch.zeros(2, 3, 8, requires_grad=True)
    encode(encoder, events, torch.tensor([0, 0]), torch.arange(3)).sum().backward()
    assert events.grad is not None
    assert not events.grad.any()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


@pytest.mark.parametrize("causal", [True, False])
def test_thousand_events(causal: bool) -> None:
    encoder = HistoryEncoder(width=8, layers=1, heads=2, causal=causal)
    torch.manual_seed(0)
    events = torch.randn(2, 1024, 8)
    got = encode(encoder, events, torch.tensor([1024, 1000]), torch.arange(1024))
    assert got.isfinite().all()
    alone = encode(encoder, events[1:, :1000], torch.tensor([1000]), torch.arange(1000))
    assert_close(got[1, :1000], alone[0], atol=1e-4, rtol=1e-3)


def test_block_without_encoder_and_projection_is_the_reader() -> None:
    inputs = make_inputs()
    sequences = make_embeddings()(inputs).sequences
    assert sequences is not None
    events, reader = make_events(), MeanHistory(width=WIDTH)
    bare = HistoryBlock(events=events, encoder=None, reader=reader)
    query = torch.zeros(int(inputs.candidate_counts.sum()), 1)
    lengths = sequences[HISTORY_KEYS[0]].lengths()
    rows = JaggedRows(lengths, values=int(lengths.sum()), slots=len(inputs.history_slots))
    want = reader(query, rows.pad(events(sequences, inputs)), lengths, inputs)
    assert_close(bare(query, sequences, inputs), want)
    assert bare.out_dim == WIDTH
    projection = CrossProjection(in_dim=WIDTH, out_dim=3)
    narrow = HistoryBlock(events=events, encoder=None, reader=reader, projection=projection)
    assert_close(narrow(query, sequences, inputs), projection(want))
    assert narrow.out_dim == 3


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: HistoryEncoder(width=6, heads=4), "width is 6 and heads is 4"),
        (lambda: HistoryEncoder(width=8, layers=0), "layers is 0; it must be at least 1"),
        (lambda: HistoryEncoder(width=8, dropout=-0.1), "dropout is -0.1"),
        (lambda: EventEmbedding(sequences={}, width=8, actions=1, surfaces=1), "sequences is empty.*at least 1"),
        (lambda: make_events(age_buckets=0), "age_buckets is 0"),
    ],
)
def test_bad_arguments(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_one_hot_by_hand_and_no_code_out_of_range() -> None:
    got = one_hot(torch.tensor([2, 0], dtype=torch.int32), 3, dtype=torch.float32)
    assert got.tolist() == [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    for code in (-1, 3):
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            one_hot(torch.tensor([code]), 3, dtype=torch.float32)
