"""The summed user state against a loop over events, and what it must not see."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from components.cross import LinearProjection
from components.inputs import ModelInputs
from components.user_state import LONGEST_S, SHORTEST_S, UserState
from tests.components.batches import make_inputs

Sequences = dict[str, JaggedTensor]


def history(lengths: list[int], candidates: list[int], *, same: bool = False) -> tuple[ModelInputs, Sequences]:
    """Requests with histories of the given lengths, event ids as vectors of 3; `same` makes all events alike."""
    torch.manual_seed(1)
    inputs = make_inputs(candidates=(candidates,), histories=lengths, surfaces=("hf",))
    values = torch.randn(sum(lengths), 3)
    inputs.history_action = inputs.history_action % 3
    if same:
        values = torch.ones_like(values) * torch.tensor([0.3, -0.2, 0.1])
        inputs.history_action, inputs.history_surface = (torch.ones(sum(lengths), dtype=torch.int64),) * 2
        inputs.history_age = torch.full((sum(lengths),), 60.0)
    return inputs, {"history_item": JaggedTensor(values=values, lengths=torch.tensor(lengths))}


def block(**overrides: object) -> UserState:
    torch.manual_seed(3)
    settings: dict[str, object] = {
        "sequences": {"history_item": 3},
        "query_dim": 5,
        "width": 4,
        "actions": 3,
        "surface_codes": [2, 1],
        "all_surfaces": 4,
    }
    made = UserState(**{**settings, **overrides})  # type: ignore[arg-type]
    with torch.no_grad():
        for gate in (made.surface, made.own):
            gate.weight.normal_()
    return made


def by_loop(state: UserState, sequences: Sequences, inputs: ModelInputs, request: int, query: Tensor) -> Tensor:
    """One candidate's output, event by event, as the formula in the module's head says."""
    start, end = sequences["history_item"].offsets()[request : request + 2].tolist()
    total = torch.zeros(state.state.in_features)
    own_code = state.surface_codes[inputs.surface_of_request[request]]
    for h in range(start, end):
        code = int(inputs.history_surface[h])
        x = state.norm(state.project(sequences["history_item"].values()[h]))
        x = x * state.action.weight[int(inputs.history_action[h])]
        x = x * state.surface.weight[code] * state.own.weight[int(code == own_code)]
        x = x * torch.exp(-inputs.history_age[h] / state.log_tau.exp())
        total = total + x
    z = torch.tanh(state.state(torch.asinh(total / state.scale)))
    return torch.cat([z, z * state.query(query)])


def test_equals_a_loop_over_events() -> None:
    inputs, sequences = history([3, 0, 2], [1, 2, 2])
    inputs.surface_of_request = torch.tensor([0, 0, 1])
    state = block()
    query = torch.randn(5, 5)
    found = state(query, sequences, inputs)
    for c, request in enumerate(inputs.request_of_candidate.tolist()):
        torch.testing.assert_close(found[c], by_loop(state, sequences, inputs, request, query[c]))


def test_an_empty_history_says_nothing_of_events() -> None:
    inputs, sequences = history([0, 2], [1, 1])
    state = block(surface_codes=[1])
    found = state(torch.zeros(2, 5), sequences, inputs)
    torch.testing.assert_close(found[0, :4], torch.tanh(state.state.bias))


def test_twice_the_events_are_twice_the_sum() -> None:
    """What a mean or a softmax would divide out."""
    state = block(surface_codes=[1])
    with torch.no_grad():
        state.state.weight.copy_(0.1 * torch.eye(4))
        state.state.bias.zero_()

    def summed(copies: int) -> Tensor:
        inputs, sequences = history([copies], [1], same=True)
        return torch.sinh(10 * torch.atanh(state(torch.zeros(1, 5), sequences, inputs)[0, :4]))

    torch.testing.assert_close(summed(2), 2 * summed(1), rtol=1e-3, atol=1e-5)


def test_time_constants_span_minutes_to_weeks() -> None:
    tau = block().log_tau.exp()
    assert tau[0].item() == pytest.approx(SHORTEST_S)
    assert tau[-1].item() == pytest.approx(LONGEST_S, rel=1e-4)
    assert tau.log().diff().std().item() == pytest.approx(0, abs=1e-4)


def test_the_projection_sets_the_width() -> None:
    inputs, sequences = history([1], [2])
    state = block(surface_codes=[1], projection=LinearProjection(in_dim=8, out_dim=2))
    assert state.out_dim == 2
    assert state(torch.zeros(2, 5), sequences, inputs).shape == (2, 2)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"sequences": {}}, "give some"),
        ({"surface_codes": []}, "give some"),
        ({"surface_codes": [4]}, r"must lie in \[0, 4\)"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"width": 0}, "width"),
    ],
)
def test_bad_settings_are_named(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        block(**wrong)


def test_half_lives_do_not_depend_on_the_width() -> None:
    assert math.isclose(
        block(width=9).log_tau[4].item(), (math.log(SHORTEST_S) + math.log(LONGEST_S)) / 2, rel_tol=1e-5
    )
