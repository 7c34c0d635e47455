"""The plain form that the broadcasting benchmark feeds is that of the model's own equality tests."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torchrec import KeyedJaggedTensor

from benchmarks.plain import expanded_inputs
from tests.components.batches import CANDIDATE_SEQUENCES, HISTORY_KEYS, expand, make_inputs


@pytest.mark.parametrize("candidates", [((2, 1), (3,), (1, 4)), ((0, 2), (1,), (0, 0))])
def test_every_candidate_becomes_a_request_with_its_data(candidates: tuple[tuple[int, ...], ...]) -> None:
    inputs = make_inputs(candidates=candidates)
    mine = expanded_inputs(inputs, candidate_keys=CANDIDATE_SEQUENCES, history_key=HISTORY_KEYS[0])
    theirs = expand(inputs)
    for field in fields(theirs):
        a, b = getattr(mine, field.name), getattr(theirs, field.name)
        if isinstance(b, KeyedJaggedTensor):
            assert a.keys() == b.keys()
            assert torch.equal(a.values(), b.values()), field.name
            assert torch.equal(a.lengths(), b.lengths()), field.name
        elif isinstance(b, torch.Tensor):
            torch.testing.assert_close(a, b, equal_nan=True, rtol=0, atol=0)
        else:
            assert a == b, field.name
