"""The readers of a history against loops over candidates and events."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from components.attention import CandidateAttention, MeanHistory, TargetAttention
from components.inputs import ModelInputs
from tests.components.batches import WIDTH, make_inputs, make_reader

Q = 5


def case(counts: list[int], lengths: list[int], padding: int = 0) -> tuple[ModelInputs, Tensor, Tensor, Tensor]:
    """Inputs, queries [C, Q], events [R, L, D] that are zero behind each history, lengths [R]."""
    torch.manual_seed(sum(counts) + sum(lengths))
    inputs = make_inputs(candidates=(counts,), histories=lengths, padding=padding, surfaces=("hf",))
    lengths_R = torch.tensor(lengths, dtype=torch.int64)
    events = torch.zeros(len(lengths), inputs.history_slots.shape[0], WIDTH)
    for r, n in enumerate(lengths):
        events[r, :n] = torch.randn(n, WIDTH)
    return inputs, torch.randn(sum(counts), Q), events, lengths_R


def slow_candidate_attention(block: CandidateAttention, inputs: ModelInputs, query: Tensor, events: Tensor) -> Tensor:
    rows = []
    for c, r in enumerate(inputs.request_of_candidate.tolist()):
        history = [e for e in events[r] if e.any()]
        q = block.query(query[c]).view(block.heads, -1)
        heads = []
        for h in range(block.heads):
            scores, values = [torch.tensor(0.0)], [torch.zeros(q.shape[1])]
            for e in history:
                key, value = block.key_value(e).view(2, block.heads, -1)[:, h]
                scores.append(q[h] @ key / math.sqrt(q.shape[1]))
                values.append(value)
            weights = torch.stack(scores).softmax(0)
            heads.append(sum((w * v for w, v in zip(weights, values, strict=True)), torch.zeros(q.shape[1])))
        attended = torch.cat(heads)
        mean = torch.stack(history).mean(0) if history else torch.zeros(WIDTH)
        rows.append(torch.cat([attended, q.flatten() * attended, mean]))
    return torch.stack(rows) if rows else torch.zeros(0, block.out_dim)


def slow_target_attention(block: TargetAttention, inputs: ModelInputs, query: Tensor, events: Tensor) -> Tensor:
    rows = []
    for c, r in enumerate(inputs.request_of_candidate.tolist()):
        history = [e for e in events[r] if e.any()]
        q = block.query(query[c])
        if not history:
            rows.append(torch.zeros(WIDTH))
            continue
        first = [block.activation(block.unit_in(torch.cat([q, e, q - e, q * e]))) for e in history]
        units = [block.unit_out(block.unit_deep(x)) for x in first]
        weights = torch.cat(units)
        if block.softmax:
            weights = weights.softmax(0)
        rows.append((weights.unsqueeze(1) * torch.stack(history)).sum(0))
    return torch.stack(rows) if rows else torch.zeros(0, WIDTH)


@pytest.mark.parametrize("softmax", [True, False])
def test_weights_are_those_that_attention_uses(softmax: bool) -> None:
    inputs, query, events, lengths = case([2, 1, 3], [3, 0, 4])
    plain = CandidateAttention(query_dim=Q, width=WIDTH, heads=1, with_product=False, with_mean=False)
    with torch.no_grad():
        plain.key_value.weight[WIDTH:].copy_(torch.eye(WIDTH))
    own = events.index_select(0, inputs.request_of_candidate)
    weights = plain.weights(query, events, lengths, inputs)
    assert_close(weights.sum(1), torch.ones(6))
    assert_close((weights[:, 1:].unsqueeze(2) * own).sum(1), plain(query, events, lengths, inputs))
    assert_close(weights[2], torch.tensor([1.0, 0, 0, 0, 0]))
    several = CandidateAttention(query_dim=Q, width=WIDTH, heads=2)
    assert_close(several.weights(query, events, lengths, inputs).sum(1), torch.ones(6))
    target = TargetAttention(query_dim=Q, width=WIDTH, softmax=softmax)
    weights = target.weights(query, events, lengths, inputs)
    assert_close((weights[:, 1:].unsqueeze(2) * own).sum(1), target(query, events, lengths, inputs))
    assert_close(weights[:, 0], torch.zeros(6))


shapes = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=4)


@pytest.mark.parametrize("few_candidates", [False, True])
@settings(max_examples=25, deadline=None)
@given(shape=shapes)
def test_candidate_attention_equals_the_loop(few_candidates: bool, shape: list[tuple[int, int]]) -> None:
    inputs, query, events, lengths = case([c for c, _ in shape], [n for _, n in shape])
    block = CandidateAttention(query_dim=Q, width=WIDTH, heads=2, head_dim=3, few_candidates=few_candidates)
    want = slow_candidate_attention(block, inputs, query, events)
    assert block.out_dim == 2 * 6 + WIDTH
    assert_close(block(query, events, lengths, inputs), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("softmax", "hidden", "activation"), [(True, (3,), "relu"), (False, (3, 2), "sigmoid")])
@settings(max_examples=25, deadline=None)
@given(shape=shapes)
def test_target_attention_equals_the_loop(
    softmax: bool, hidden: tuple[int, ...], activation: str, shape: list[tuple[int, int]]
) -> None:
    inputs, query, events, lengths = case([c for c, _ in shape], [n for _, n in shape])
    block = TargetAttention(query_dim=Q, width=WIDTH, hidden=hidden, activation=activation, softmax=softmax)
    want = slow_target_attention(block, inputs, query, events)
    assert_close(block(query, events, lengths, inputs), want, atol=1e-5, rtol=1e-4)


def test_mean_by_hand() -> None:
    inputs, query, events, lengths = case([2, 1], [2, 0])
    events[0, 0], events[0, 1] = 1.0, 4.0
    got = MeanHistory(width=WIDTH)(query, events, lengths, inputs)
    assert got.tolist() == [[2.5] * WIDTH, [2.5] * WIDTH, [0.0] * WIDTH]


def test_projecting_queries_or_events_is_the_same_to_the_gradients() -> None:
    inputs, query, events, lengths = case([2, 0, 3], [3, 2, 0])
    block = CandidateAttention(query_dim=Q, width=WIDTH, heads=2)
    found = []
    for block.few_candidates in (False, True):
        leaves = [query.clone().requires_grad_(), events.clone().requires_grad_()]
        read = block(*leaves, lengths, inputs)
        loss = (read * torch.linspace(-1, 1, read.numel()).view_as(read)).sum()
        found.append((read, *torch.autograd.grad(loss, [*leaves, *block.parameters()])))
    for one, other in zip(*found, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("kind", ["attention", "few candidates", "target", "mean"])
def test_empty_history_reads_as_zero_and_sends_no_nan_back(kind: str) -> None:
    inputs, query, events, lengths = case([2, 3], [0, 2])
    block = make_reader(kind, Q)
    query.requires_grad_()
    events.requires_grad_()
    got = block(query, events, lengths, inputs)
    assert not got[:2].any()
    assert got[2:].any()
    got.square().sum().backward()
    for tensor in (query, events, *block.parameters()):
        assert tensor.grad is None or tensor.grad.isfinite().all()
    assert events.grad is not None
    assert not events.grad[0].any()


@pytest.mark.parametrize("kind", ["attention", "target", "mean"])
def test_padding_changes_nothing(kind: str) -> None:
    block = make_reader(kind, Q)
    inputs, query, events, lengths = case([2, 3], [3, 2])
    wide, *_ = case([2, 3], [3, 2], padding=4)
    longer = torch.nn.functional.pad(events, (0, 0, 0, 4))
    want = block(query, events, lengths, inputs)
    assert_close(block(query, longer, lengths, wide), want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["attention", "target", "mean"])
def test_order_of_bare_events_does_not_matter(kind: str) -> None:
    block = make_reader(kind, Q)
    inputs, query, events, lengths = case([2, 3], [3, 3])
    want = block(query, events, lengths, inputs)
    assert_close(block(query, events[:, [2, 0, 1]], lengths, inputs), want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["attention", "target", "mean"])
def test_order_of_candidates_follows_the_rows(kind: str) -> None:
    block = make_reader(kind, Q)
    inputs, query, events, lengths = case([4], [3])
    want = block(query, events, lengths, inputs)
    order = [2, 0, 3, 1]
    assert_close(block(query[order], events, lengths, inputs), want[order], atol=1e-6, rtol=1e-5)


def test_parts_of_the_output_can_be_left_out() -> None:
    inputs, query, events, lengths = case([2, 1], [2, 3])
    full = CandidateAttention(query_dim=Q, width=WIDTH, heads=2)
    bare = CandidateAttention(query_dim=Q, width=WIDTH, heads=2, with_product=False, with_mean=False)
    bare.load_state_dict(full.state_dict())
    assert bare.out_dim == WIDTH
    assert_close(bare(query, events, lengths, inputs), full(query, events, lengths, inputs)[:, :WIDTH])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CandidateAttention(query_dim=4, width=6, heads=4), "width is 6 and heads is 4"),
        (lambda: CandidateAttention(query_dim=4, width=6, heads=0), "heads is 0; it must be at least 1"),
        (lambda: CandidateAttention(query_dim=4, width=6, heads=2, head_dim=0), "head_dim is 0"),
        (lambda: TargetAttention(query_dim=4, width=6, hidden=(0,)), r"hidden\[0\] is 0"),
        (lambda: TargetAttention(query_dim=4, width=6, hidden=()), "at least 1 hidden layer"),
        (lambda: MeanHistory(width=0), "width is 0"),
    ],
)
def test_bad_arguments(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
