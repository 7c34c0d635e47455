"""Request, candidate and late vectors: what stands where, by key; and rows, masks and names beneath them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedTensor

from components.embeddings import Embedded, EmbeddingLayer
from components.engagement_model import EngagementBody
from components.features import CandidateVector, RequestVector, SurfaceEmbedding
from components.gating import EPNet
from components.late_fusion import NORM_EPS, LateFusion
from components.mlp import SplitMLP
from components.names import keep_surfaces, surface_key, surface_of, task_key
from components.numeric import NumericFeatures
from components.ragged import offsets_of, pad_rows, row_mask, split_surfaces, unpad_rows
from components.towers import SharedTower, Towers
from components.trunk import Trunk
from tests.components.batches import DIM, SURFACES, TASKS, jagged, make_body, make_embeddings, make_inputs


def reverse_keys(kt: KeyedTensor) -> KeyedTensor:
    """The same embeddings with their keys in another order, as sharding gives them."""
    keys = list(reversed(kt.keys()))
    return KeyedTensor.from_tensor_list(keys, [kt[key] for key in keys], key_dim=1, cat_dim=1)


def test_request_vector_part_by_part() -> None:
    inputs, embedded = make_inputs(), make_embeddings()(make_inputs())
    surface = SurfaceEmbedding(surfaces=SURFACES, dim=3)
    numeric = NumericFeatures(mean=[0.5, 0.0], std=[2.0, 1.0])
    vector = RequestVector(bags={"query": DIM, "user": DIM}, sequences={"pin": DIM}, numeric=numeric, surface=surface)
    got = vector(embedded, inputs)
    assert vector.out_dim == got.shape[1] == 3 * DIM + 4 + 3
    assert embedded.request is not None
    assert embedded.sequences is not None
    pins = jagged(embedded.sequences["pin"].values(), embedded.sequences["pin"].lengths())
    for r, s in enumerate(inputs.surface_of_request.tolist()):
        pin = pins[r][0] if len(pins[r]) else torch.zeros(DIM)
        parts = [embedded.request["query"][r], embedded.request["user"][r], pin, numeric(inputs.request_numeric)[r]]
        assert_close(got[r], torch.cat([*parts, surface.vectors[surface_key(SURFACES[s])]]))
    assert not got[:2, 2 * DIM : 3 * DIM].any()  # only rp has a related pin
    assert got[3:, 2 * DIM : 3 * DIM].any()


def test_candidate_vector_part_by_part() -> None:
    inputs, embedded = make_inputs(), make_embeddings()(make_inputs())
    vector = CandidateVector(bags={"ad": DIM}, sequences={"author": DIM, "item": DIM})
    assert embedded.candidate is not None
    assert embedded.sequences is not None
    want = [embedded.candidate["ad"], embedded.sequences["author"].values(), embedded.sequences["item"].values()]
    assert_close(vector(embedded, inputs), torch.cat(want, dim=1))
    assert vector.keys == {"ad", "author", "item"}


def test_the_order_of_keys_does_not_matter() -> None:
    inputs, embedded = make_inputs(), make_embeddings()(make_inputs())
    assert embedded.request is not None
    assert embedded.candidate is not None
    assert embedded.sequences is not None
    shuffled = Embedded(
        request=reverse_keys(embedded.request),
        candidate=reverse_keys(embedded.candidate),
        sequences=dict(reversed(embedded.sequences.items())),
    )
    body = make_body()
    assert torch.equal(body(embedded, inputs).logits, body(shuffled, inputs).logits)


def test_without_collections_numbers_are_enough() -> None:
    inputs = make_inputs()
    embedded = EmbeddingLayer()(inputs)
    request = RequestVector(numeric=NumericFeatures(mean=[0.0] * 2, std=[1.0] * 2))
    candidate = CandidateVector(numeric=NumericFeatures(mean=[0.0] * 3, std=[1.0] * 3))
    assert request(embedded, inputs).shape == (5, 4)
    assert candidate(embedded, inputs).shape == (11, 6)


def test_absent_keys_are_zeros_and_need_no_table() -> None:
    inputs, embedded = make_inputs(), EmbeddingLayer()(make_inputs())
    request = RequestVector(bags={"user": 2}, sequences={"pin": 3}, absent=["user", "pin"])
    candidate = CandidateVector(bags={"ad": 2}, sequences={"item": 3}, absent=["ad", "item"])
    assert torch.equal(request(embedded, inputs), torch.zeros(5, 5))
    assert torch.equal(candidate(embedded, inputs), torch.zeros(11, 5))


@pytest.mark.parametrize("position", range(3))
def test_late_fusion_reads_its_own_rows(position: int) -> None:
    inputs, embedded = make_inputs(), make_embeddings()(make_inputs())
    request, candidate = RequestVector(bags={"user": DIM}), CandidateVector(bags={"ad": DIM})
    block = LateFusion(request=request, candidate=candidate, candidate_dim=6, width=5)
    vectors = torch.randn(11, 6)
    got = block(embedded, inputs, vectors, position, 3)
    start = sum(inputs.candidates_per_surface[:position])
    assert got.shape == (inputs.candidates_per_surface[position], block.out_dim)
    assert embedded.request is not None
    assert embedded.candidate is not None
    for row, late in enumerate(got, start=start):
        owner = int(inputs.request_of_candidate[row])
        seen = block.project_request.weight @ embedded.request["user"][owner]
        seen = (seen - seen.mean()) / (seen.var(correction=0) + NORM_EPS).sqrt()
        met = seen * (block.project_candidate.weight @ vectors[row])
        assert_close(late, torch.cat([seen, met, embedded.candidate["ad"][row]]), atol=1e-6, rtol=1e-5)


def test_late_fusion_of_an_absent_feature_adds_nothing() -> None:
    inputs, embedded = make_inputs(), make_embeddings()(make_inputs())
    block = LateFusion(request=RequestVector(sequences={"pin": DIM}), candidate=None, candidate_dim=6, width=5)
    assert not block(embedded, inputs, torch.randn(11, 6), 0, 3).any()
    assert block(embedded, inputs, torch.randn(11, 6), 2, 3).any()


def test_late_fusion_does_not_depend_on_how_small_its_table_starts() -> None:
    inputs, embedded = make_inputs(), make_embeddings()(make_inputs())
    block = LateFusion(request=RequestVector(bags={"user": DIM}), candidate=None, candidate_dim=6, width=5)
    vectors = torch.randn(11, 6)
    assert embedded.request is not None
    bags = embedded.request
    larger = embedded._replace(request=KeyedTensor(bags.keys(), bags.length_per_key(), 7 * bags.values()))
    assert_close(block(larger, inputs, vectors, 1, 3), block(embedded, inputs, vectors, 1, 3), atol=1e-3, rtol=1e-3)


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(0, 4), min_size=1, max_size=6), padding=st.integers(0, 3))
def test_unpadding_undoes_padding(lengths: list[int], padding: int) -> None:
    counts = torch.tensor(lengths)
    values = torch.randn(sum(lengths), 3)
    offsets, longest = offsets_of(counts), max(lengths) + padding
    padded = pad_rows(values, offsets, longest)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), counts)
    assert torch.equal(unpad_rows(padded, offsets, owner), values)
    mask = row_mask(counts, torch.arange(longest))
    assert mask.sum(1).tolist() == lengths
    assert not padded[~mask].any()


def test_split_with_one_surface_reads_no_counts() -> None:
    rows = torch.ones(3, 1)
    assert split_surfaces(rows, [-1], 1)[0] is rows


def test_names() -> None:
    assert surface_of("towers.trees.surface_hf.trunk.weight") == "hf"
    assert surface_of("towers.trunk.weight") is None
    assert task_key("click") == "task_click"
    body = make_body()
    state = body.state_dict()
    kept = keep_surfaces(state, keep=["rp"])
    assert list(kept) == [name for name in state if surface_of(name) in (None, "rp")]
    assert {surface_of(name) for name in state} == {None, *SURFACES}
    with pytest.raises(ValueError, match=r"'a\.b' cannot name a surface"):
        surface_key("a.b")
    with pytest.raises(ValueError, match="'' cannot name a task"):
        task_key("")


def parts() -> dict[str, Any]:
    """Arguments of a small body for three surfaces."""
    request = RequestVector(bags={"user": DIM}, surface=SurfaceEmbedding(surfaces=SURFACES, dim=2))
    candidate = CandidateVector(bags={"ad": DIM})
    deep = SplitMLP(request_dim=request.out_dim, candidate_dim=DIM, hidden=[4])
    return {
        "surfaces": SURFACES,
        "tasks": TASKS,
        "request": request,
        "candidate": candidate,
        "trunk": Trunk(cross=None, deep=deep),
        "towers": Towers(surfaces=SURFACES, tasks=TASKS, in_dim=4, hidden=[], late_dims={"sr": 6}),
        "calibration": make_body().calibration,
    }


def late(key: str) -> LateFusion:
    return LateFusion(request=RequestVector(bags={key: DIM}), candidate=None, candidate_dim=DIM, width=3)


def with_gate() -> Trunk:
    """A trunk whose gate knows other surfaces than the body."""
    gate = EPNet(surfaces=("hf",), in_dim=DIM, hidden=2)
    return Trunk(cross=None, deep=SplitMLP(request_dim=6, candidate_dim=DIM, hidden=[4]), candidate_gate=gate)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surfaces": ("hf", "sr")}, r"request vector was built for surfaces \['hf', 'sr', 'rp'\], the body for"),
        ({"tasks": ("click",)}, r"towers was built for tasks \['click', 'save'\], the body for \['click'\]"),
        ({"trunk": "gate"}, r"candidate gate was built for surfaces \['hf'\]"),
        ({"late": {"xx": late("query")}}, r"late names surfaces \['xx'\], which are not among"),
        ({"late": {"sr": late("user")}}, r"\['user'\] stand both in the shared vectors and in .* 'sr'"),
        (
            {"late": {"sr": late("query"), "rp": late("pin")}},
            "tower of 'rp' was built for a late vector of width 0, its late fusion gives 6",
        ),
        ({}, "tower of 'sr' was built for a late vector of width 6, its late fusion gives 0"),
        (
            {"towers": SharedTower(tasks=TASKS, in_dim=4, hidden=[]), "late": {"sr": late("query")}},
            r"late fusion of \['sr'\] needs Towers",
        ),
    ],
)
def test_a_body_of_parts_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    change = {key: with_gate() if value == "gate" else value for key, value in change.items()}
    with pytest.raises(ValueError, match=message):
        EngagementBody(**(parts() | change))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RequestVector(bags={"user": 0}), "user is 0; it must be at least 1"),
        (lambda: RequestVector(), "width of the request vector is 0"),
        (lambda: CandidateVector(bags={"x": 1}, sequences={"x": 1}), r"\['x'\] stand both in bags"),
        (lambda: CandidateVector(bags={"x": 1}, absent=["y"]), r"absent names \['y'\].*\['x'\]"),
        (lambda: LateFusion(request=None, candidate=None, candidate_dim=1, width=1), "both None"),
        (lambda: Trunk(cross=None, deep=None), "cross and deep are both None"),
        (lambda: SurfaceEmbedding(surfaces=["hf"], dim=0), "dim is 0"),
    ],
)
def test_bad_arguments(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_a_request_reads_the_first_of_several_shared_ids() -> None:
    inputs = make_inputs(candidates=([1],), histories=[1], surfaces=("hf",))
    two = JaggedTensor(values=torch.tensor([[1.0], [2.0]]), lengths=torch.tensor([2]))
    vector = RequestVector(sequences={"pin": 1})
    embedded = Embedded(request=None, candidate=None, sequences={"pin": two})
    assert vector(embedded, inputs).tolist() == [[1.0]]
