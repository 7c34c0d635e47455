"""The whole model: broadcast equals plain, surfaces keep to themselves, pruning, tracing, export, edge batches."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
import torch.fx.experimental._config
from torch import Tensor, nn
from torch.testing import assert_close
from torchrec import KeyedJaggedTensor

from components.embeddings import Embedded
from components.engagement_model import EngagementModel
from components.inputs import ModelInputs
from components.names import keep_surfaces, surface_of
from tests.components.batches import (
    CANDIDATE_BAGS,
    CANDIDATE_SEQUENCES,
    HISTORY_KEYS,
    ONLY_ON,
    REQUEST_BAGS,
    REQUEST_SEQUENCES,
    SURFACES,
    expand,
    make_inputs,
    make_model,
    take_surface,
)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradient of every parameter; a parameter that took no part fails."""
    model.zero_grad()
    loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing, missing
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def total(model: EngagementModel, inputs: ModelInputs) -> Tensor:
    outputs = model(inputs)
    weight = torch.linspace(0.5, 1.5, outputs.logits.numel()).view_as(outputs.logits)
    return (weight * (outputs.logits.square() + outputs.calibrated)).sum()


@pytest.mark.parametrize("reader", ["attention", "target", "mean"])
@pytest.mark.parametrize("causal", [True, False])
def test_broadcast_equals_plain_with_gradients(reader: str, causal: bool) -> None:
    model, grouped = make_model(reader=reader, causal=causal), make_inputs()
    plain = expand(grouped)
    for mine, theirs in zip(model(grouped), model(plain), strict=True):
        assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    assert_close(gradients(model, total(model, grouped)), gradients(model, total(model, plain)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reader", ["attention", "target", "mean"])
@pytest.mark.parametrize("parts", [2, 3, 99])
def test_micro_batches_are_the_batch_with_gradients(reader: str, parts: int) -> None:
    model, inputs = make_model(reader=reader), make_inputs()
    want, want_gradients = model(inputs), gradients(model, total(model, inputs))
    model.body.micro_batches = parts
    for mine, theirs in zip(model(inputs), want, strict=True):
        assert_close(mine, theirs, atol=1e-6, rtol=1e-5)
    assert_close(gradients(model, total(model, inputs)), want_gradients, atol=1e-5, rtol=1e-4)


def test_embedding_dropout_drops_pooled_values_in_training_only() -> None:
    model, inputs = make_model(), make_inputs()
    whole, seen = model.embeddings(inputs), []
    model.body.request.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    before = model.eval()(inputs)
    model.body.embedding_dropout = 0.5
    assert_close(model(inputs), before, atol=0, rtol=0)
    model.train()(inputs)
    dropped = seen[-1]
    for mine, theirs in ((dropped.request, whole.request), (dropped.candidate, whole.candidate)):
        kept = mine.values() != 0
        assert mine.keys() == theirs.keys()
        assert 0.2 < kept.float().mean() < 0.8
        assert_close(mine.values()[kept], 2 * theirs.values()[kept])
    for key, events in whole.sequences.items():
        assert_close(dropped.sequences[key].values(), events.values())


def test_micro_batches_keep_the_activations_of_one() -> None:
    model, inputs = make_model(), make_inputs()
    seen: list[int] = []
    model.body.trunk.register_forward_hook(lambda _m, _a, out: seen.append(out.shape[0]))
    model.body.micro_batches = 5
    loss = total(model, inputs)
    forward = list(seen)
    loss.backward()
    assert forward == [2, 1, 3, 1, 4], "one request at a time"
    assert sorted(seen[len(forward) :]) == sorted(forward), "and each once more in the backward pass"
    model.eval()
    seen.clear()
    model(inputs)
    assert seen == [11], "scoring is in one piece"


@pytest.mark.parametrize("reader", ["attention", "target", "mean"])
@pytest.mark.parametrize("causal", [True, False])
def test_padding_changes_nothing(reader: str, causal: bool) -> None:
    model = make_model(reader=reader, causal=causal)
    assert_close(model(make_inputs(padding=3)).logits, model(make_inputs()).logits, atol=1e-6, rtol=1e-5)


def test_same_inputs_give_same_bits() -> None:
    model, inputs = make_model(), make_inputs()
    assert torch.equal(model(inputs).logits, model(inputs).logits)
    first, second = (gradients(model, total(model, inputs)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("position", range(3))
def test_a_surface_trains_nothing_of_the_others(position: int) -> None:
    model, inputs = make_model(), make_inputs()
    start = sum(inputs.candidates_per_surface[:position])
    rows = slice(start, start + inputs.candidates_per_surface[position])
    outputs = model(inputs)
    grads = gradients(model, (outputs.logits[rows] + outputs.calibrated[rows]).sum())
    for name, grad in grads.items():
        owner = surface_of(name)
        if owner is not None and owner != SURFACES[position]:
            assert not grad.any(), name
    touched = {part for name, grad in grads.items() if surface_of(name) and grad.any() for part in name.split(".")}
    assert {"towers", "gates", "calibration", "request_gate", "vectors"} <= touched


def test_calibration_sends_no_gradient_to_the_model() -> None:
    model, inputs = make_model(), make_inputs()
    parameters = dict(model.named_parameters())
    model(inputs).calibrated.sum().backward()
    got = {name for name, p in parameters.items() if p.grad is not None}
    assert got == {name for name in parameters if name.startswith("body.calibration.")}


EDGES = {
    "surface without requests": ([[2, 1], [], [3]], [3, 0, 2]),
    "first surface empty": ([[], [2], [1]], [1, 2]),
    "requests without candidates": ([[0, 0], [2], [0, 1]], [1, 2, 0, 3, 1]),
    "one candidate": ([[1], [], []], [2]),
    "all histories empty": ([[2], [1], [1, 2]], [0, 0, 0, 0]),
}


@pytest.mark.parametrize("case", EDGES)
@pytest.mark.parametrize("reader", ["attention", "target", "mean"])
@pytest.mark.parametrize("causal", [True, False])
def test_edge_batches_are_finite_and_touch_every_parameter(case: str, reader: str, causal: bool) -> None:
    candidates, histories = EDGES[case]
    model, inputs = (
        make_model(reader=reader, causal=causal),
        make_inputs(candidates=candidates, histories=histories),
    )
    outputs = model(inputs)
    assert outputs.logits.shape == outputs.calibrated.shape == (sum(map(sum, candidates)), 2)
    assert outputs.logits.isfinite().all()
    assert outputs.calibrated.isfinite().all()
    assert all(grad.isfinite().all() for grad in gradients(model, total(model, inputs)).values())


def test_an_empty_surface_changes_nothing_for_the_others() -> None:
    model = make_model()
    full = make_inputs()
    alone = make_inputs(candidates=((2, 1), (), ()), histories=(3, 0))
    same = take_surface(full, 0)
    for f in fields(ModelInputs):
        if f.name not in ("requests_per_surface", "candidates_per_surface"):
            setattr(alone, f.name, getattr(same, f.name))
    assert_close(model(alone).logits, model(full).logits[:3], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("position", range(3))
def test_pruned_body_gives_the_unified_outputs(position: int) -> None:
    surface = SURFACES[position]
    unified, inputs = make_model(), make_inputs()
    absent = [key for key, only in ONLY_ON.items() if only != surface]
    pruned = make_model((surface,), absent=absent, seed=1)
    pruned.body.load_state_dict(keep_surfaces(unified.body.state_dict(), keep=[surface]), strict=True)
    pruned.embeddings.load_state_dict(
        {k: v for k, v in unified.embeddings.state_dict().items() if k in pruned.embeddings.state_dict()}
    )
    assert len(pruned.body.state_dict()) < len(unified.body.state_dict())
    start = sum(inputs.candidates_per_surface[:position])
    rows = slice(start, start + inputs.candidates_per_surface[position])
    got = pruned(take_surface(inputs, position, drop=absent))
    want = unified(inputs)
    assert_close(got.logits, want.logits[rows], atol=1e-6, rtol=1e-5)
    assert_close(got.calibrated, want.calibrated[rows], atol=1e-6, rtol=1e-5)


def test_absent_key_reads_as_an_empty_bag() -> None:
    inputs = make_inputs()
    model = make_model()
    lengths = inputs.request_ids.lengths().view(len(REQUEST_BAGS), -1).clone()
    kept = {key: inputs.request_ids[key] for key in REQUEST_BAGS}
    lengths[REQUEST_BAGS.index("device")] = 0
    emptied = KeyedJaggedTensor(
        keys=list(REQUEST_BAGS),
        values=torch.cat([kept[key].values() for key in REQUEST_BAGS if key != "device"]),
        lengths=lengths.flatten(),
    )
    inputs.request_ids = emptied
    want = model(inputs).logits
    model.body.request.absent = frozenset({"device"})
    assert_close(model(inputs).logits, want)


class BodyLeaf(torch.fx.Tracer):
    """Traces as TorchRec's pipeline does: collections and what holds none of them are leaves."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in (
            "body",
            "embeddings.request_bags",
            "embeddings.candidate_bags",
            "embeddings.sequences",
        )


def test_traced_model_calls_only_collections_and_body() -> None:
    model, inputs = make_model(), make_inputs()
    graph = BodyLeaf().trace(model)
    assert [n.target for n in graph.nodes if n.op == "call_module"] == [
        "embeddings.request_bags",
        "embeddings.candidate_bags",
        "embeddings.sequences",
        "body",
    ]
    assert not [n for n in graph.nodes if n.op == "call_method"]
    traced = torch.fx.GraphModule(model, graph)
    assert torch.equal(traced(inputs).logits, model(inputs).logits)


class FlatModel(nn.Module):
    """One surface's model on bare tensors, as an exported program takes them."""

    def __init__(self, model: EngagementModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tensors: dict[str, Tensor]) -> Tensor:
        t = dict(tensors)

        def kjt(name: str, keys: tuple[str, ...]) -> KeyedJaggedTensor:
            return KeyedJaggedTensor(keys=list(keys), values=t.pop(name), lengths=t.pop(name + "_lengths"))

        inputs = ModelInputs(
            request_ids=kjt("request_ids", REQUEST_BAGS),
            candidate_ids=kjt("candidate_ids", CANDIDATE_BAGS),
            sequence_ids=kjt("sequence_ids", HISTORY_KEYS + REQUEST_SEQUENCES + CANDIDATE_SEQUENCES),
            requests_per_surface=[-1],
            candidates_per_surface=[-1],
            **t,
        )
        return self.model(inputs).calibrated


def flat(inputs: ModelInputs) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for f in fields(ModelInputs):
        value = getattr(inputs, f.name)
        if isinstance(value, KeyedJaggedTensor):
            tensors |= {f.name: value.values(), f.name + "_lengths": value.lengths()}
        elif isinstance(value, Tensor):
            tensors[f.name] = value
    return tensors


@pytest.mark.parametrize("causal", [True, False])
def test_one_surface_model_exports_with_dynamic_sizes(causal: bool) -> None:
    surface = "sr"
    model = FlatModel(make_model((surface,), causal=causal).eval())

    def batch(counts: list[int], histories: list[int], seed: int) -> dict[str, Tensor]:
        # At least two slots, of which the rows need not fill any: a single slot would not meet the guards that
        # attention leaves in an exported program.
        inputs = make_inputs(candidates=(counts,), histories=histories, seed=seed, surfaces=(surface,), padding=2)
        return flat(inputs)

    example = batch([3, 4, 2], [5, 2, 4], 0)
    shapes = {name: tuple(torch.export.Dim.AUTO for _ in t.shape) for name, t in example.items()}
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):
        program = torch.export.export(model, (example,), dynamic_shapes=(shapes,), strict=False).module()
    sizes = [
        ([3, 4, 2], [5, 2, 4]),
        ([5, 2], [3, 0]),
        ([2] * 7, [9, 0, 0, 1, 2, 3, 4]),
        ([1], [1]),
        ([1], [0]),
        ([40], [16]),
    ]
    for seed, (counts, histories) in enumerate(sizes):
        other = batch(counts, histories, seed)
        assert_close(program(other), model(other), atol=1e-6, rtol=1e-5)


def test_embeddings_without_collections_are_none() -> None:
    assert Embedded(request=None, candidate=None, sequences=None) == (None, None, None)


def test_body_is_its_blocks_in_order() -> None:
    model, inputs = make_model(), make_inputs()
    body, embedded = model.body, model.embeddings(inputs)
    request, candidate = body.request(embedded, inputs), body.candidate(embedded, inputs)
    assert body.history is not None
    assert body.mixture is not None
    read = body.history(candidate, embedded.sequences, inputs)
    shared = body.trunk(request, torch.cat([candidate, read], dim=1), inputs)
    late = {
        s: body.late[f"surface_{s}"](embedded, inputs, candidate, position, 3)
        for position, s in enumerate(SURFACES)
        if s != "hf"
    }
    counts = inputs.candidates_per_surface
    logits = body.towers(body.mixture(shared, counts), counts, late)
    got = model(inputs)
    assert_close(got.logits, logits)
    assert_close(got.calibrated, body.calibration(logits, counts))


def test_trunk_is_cross_beside_deep_on_gated_inputs() -> None:
    trunk, inputs = make_model().body.trunk, make_inputs()
    x, y = trunk.request_gate.out_dim, trunk.candidate_gate.out_dim
    request, candidate, owner = torch.randn(5, x), torch.randn(11, y), inputs.request_of_candidate
    gated_x = trunk.request_gate(request, inputs.surface_of_request)
    gated_y = trunk.candidate_gate(candidate, inputs.surface_of_request[owner])
    joint = torch.cat([gated_x[owner], gated_y], dim=1)
    want = torch.cat([trunk.cross(joint), trunk.deep(gated_x, gated_y, owner)], dim=1)
    assert_close(trunk(request, candidate, inputs), want)
    assert trunk.out_dim == want.shape[1]


def test_what_belongs_to_a_request_is_computed_once_a_request() -> None:
    model, inputs = make_model(), make_inputs(candidates=([6], [7], [8]), histories=[4, 2, 3])
    rows: dict[str, int] = {}
    body = model.body
    once = {
        "encoder": body.history.encoder,
        "keys and values": body.history.reader.key_value,
        "deep, request part": body.trunk.deep.first.request,
        "request gate": body.trunk.request_gate,
        "late request part": body.late["surface_sr"].project_request,
    }
    for name, module in once.items():
        module.register_forward_hook(lambda _m, args, _o, name=name: rows.update({name: args[0].shape[0]}))
    model(inputs)
    # The encoder works on the events of the requests, each once.
    assert rows == dict.fromkeys(once, 3) | {"encoder": 9, "late request part": 1}
