"""What an artifact computes: one surface's model as a graph, from named tensors to calibrated probabilities.

Inputs are those of `components.inputs.ModelInputs`, spread into plain tensors (see `serving_tensors`); which of them
a program has depends on the features of its surface. Everything that belongs to a request is computed at R rows.

Shape letters: R requests, C candidates (sum over requests), H history events (sum over requests), L longest history,
M most candidates of one request, K keys of a group, V values, N numeric columns, T tasks.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
import torch.fx.experimental._config as fx_config
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from components.embeddings import Embedded
from components.engagement_model import EngagementModel
from components.inputs import ModelInputs
from pipeline.data.layout import FeatureLayout
from pipeline.serve.signature import TensorInput
from pipeline.serve.tables import PackedTable, PackedTables, TableDtype

# Every input that a program may have, the axis along which it may have any length, and that axis's letter.
_AXES = {
    "request_ids": (0, "V"),  # int64 [V], key by key and request by request
    "request_lengths": (0, "K*R"),  # int64 [K * R]
    "candidate_ids": (0, "V"),  # int64 [V], key by key and candidate by candidate
    "candidate_lengths": (0, "K*C"),  # int64 [K * C]
    "related_ids": (0, "V"),  # int64 [V], ids of requests in tables shared with history or candidates
    "related_lengths": (0, "K*R"),  # int64 [K * R], each 0 or 1
    "history_ids": (1, "H"),  # int64 [K, H]
    "item_ids": (1, "C"),  # int64 [K, C], ids of candidates in shared tables
    "history_lengths": (0, "R"),  # int64 [R]
    "history_action": (0, "H"),  # int64 [H]
    "history_surface": (0, "H"),  # int64 [H]
    "history_age": (0, "H"),  # float32 [H], seconds
    "history_numeric": (0, "H"),  # float32 [H, N], NaN = absent
    "request_numeric": (0, "R"),  # float32 [R, N], NaN = absent
    "candidate_numeric": (0, "C"),  # float32 [C, N], NaN = absent
    "candidate_counts": (0, "R"),  # int64 [R]
    "request_of_candidate": (0, "C"),  # int64 [C]
    "history_slots": (0, "L"),  # int64 [L], 0..L-1; L at least 1
    "candidate_slots": (0, "M"),  # int64 [M], 0..M-1
}


def input_specs(example: dict[str, Tensor]) -> tuple[TensorInput, ...]:
    """Names, dtypes and shapes of a program's inputs; a free axis is named by a letter."""

    def shape(name: str, tensor: Tensor) -> tuple[int | str, ...]:
        axis, letter = _AXES[name]
        return tuple(letter if i == axis else size for i, size in enumerate(tensor.shape))

    return tuple(
        TensorInput(name=n, dtype=str(t.dtype).removeprefix("torch."), shape=shape(n, t)) for n, t in example.items()
    )


def input_names(layout: FeatureLayout) -> tuple[str, ...]:
    """Names of a program's inputs, in order."""
    absent: set[str] = set()
    for keys, names in (
        (layout.request_bags, ("request_ids", "request_lengths")),
        (layout.candidate_bags, ("candidate_ids", "candidate_lengths")),
        (layout.request_sequences, ("related_ids", "related_lengths")),
        (layout.candidate_sequences, ("item_ids",)),
        (layout.request_numeric, ("request_numeric",)),
        (layout.candidate_numeric, ("candidate_numeric",)),
        (layout.history_numeric, ("history_numeric",)),
    ):
        if not keys:
            absent.update(names)
    if not layout.has_history:
        absent.update(n for n in _AXES if n.startswith("history_"))
    return tuple(n for n in _AXES if n not in absent)


def serving_tensors(inputs: ModelInputs, layout: FeatureLayout) -> dict[str, Tensor]:
    """A batch of one surface as the inputs of its program.

    Args:
        inputs: from `pipeline.data.assemble.assemble_inputs` with the same layout.
        layout: of the artifact.
    """
    events, candidates = inputs.history_action.shape[0], inputs.request_of_candidate.shape[0]
    requests = inputs.candidate_counts.shape[0]
    history, related, items = (len(k) for k in _sequence_groups(layout))
    ids, lengths = inputs.sequence_ids.values(), inputs.sequence_ids.lengths()
    first, last = history * events, ids.shape[0] - items * candidates
    tensors = {
        "request_ids": inputs.request_ids.values(),
        "request_lengths": inputs.request_ids.lengths(),
        "candidate_ids": inputs.candidate_ids.values(),
        "candidate_lengths": inputs.candidate_ids.lengths(),
        "related_ids": ids[first:last],
        "related_lengths": lengths[history * requests : (history + related) * requests],
        "history_ids": ids[:first].view(history, events) if history else ids[:0],
        "item_ids": ids[last:].view(items, candidates) if items else ids[:0],
        "history_lengths": lengths[:requests],
        "history_action": inputs.history_action,
        "history_surface": inputs.history_surface,
        "history_age": inputs.history_age,
        "history_numeric": inputs.history_numeric,
        "request_numeric": inputs.request_numeric,
        "candidate_numeric": inputs.candidate_numeric,
        "candidate_counts": inputs.candidate_counts,
        "request_of_candidate": inputs.request_of_candidate,
        # One empty slot where no request has an event: compiled code divides by this length.
        "history_slots": inputs.history_slots if inputs.history_slots.numel() else torch.zeros(1, dtype=torch.int64),
        "candidate_slots": inputs.candidate_slots,
    }
    return {name: tensors[name] for name in input_names(layout)}


def _sequence_groups(layout: FeatureLayout) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    return layout.history_sequences, layout.request_sequences, layout.candidate_sequences


class ServingModel(nn.Module):
    """The model of one surface with packed tables, evaluated.

    Args:
        model: built for that surface alone, its weights loaded; its tables are packed and left behind.
        layout: of that surface.
        dtype: how table values are stored.
    """

    def __init__(self, *, model: EngagementModel, layout: FeatureLayout, dtype: TableDtype) -> None:
        super().__init__()
        tables = model.embeddings
        self.layout = layout
        self.request_tables = _packed(tables.request_bags, layout.request_bags, dtype)
        self.candidate_tables = _packed(tables.candidate_bags, layout.candidate_bags, dtype)
        self.shared_tables = _packed(tables.sequences, layout.sequence_keys, dtype)
        self.body = model.body
        self.eval()

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Calibrated probabilities, float32 [C, T]."""
        embedded = Embedded(
            request=_pooled(self.request_tables, inputs, "request"),
            candidate=_pooled(self.candidate_tables, inputs, "candidate"),
            sequences=self._sequences(inputs),
        )
        return torch.sigmoid(self.body(embedded, self._model_inputs(inputs)).calibrated)

    def _sequences(self, inputs: dict[str, Tensor]) -> dict[str, JaggedTensor] | None:
        if self.shared_tables is None:
            return None
        history, related, items = _sequence_groups(self.layout)
        out: dict[str, JaggedTensor] = {}
        if history:
            rows = self.shared_tables.gather(inputs["history_ids"], history)
            out |= {k: _jagged(rows[i], inputs["history_lengths"]) for i, k in enumerate(history)}
        if items:
            rows = self.shared_tables.gather(inputs["item_ids"], items)
            out |= {k: _jagged(rows[i], inputs["candidate_counts"]) for i, k in enumerate(items)}
        requests = inputs["candidate_counts"].shape[0]
        if related:
            # Pooling gives the one row, or zeros without one, whatever the number of values of each key.
            pooled = self.shared_tables.pool(inputs["related_ids"], inputs["related_lengths"], related)
            ones = torch.ones(requests, dtype=torch.int64, device=pooled.device)
            width = pooled.shape[1] // len(related)
            out |= {k: _jagged(pooled[:, i * width : (i + 1) * width], ones) for i, k in enumerate(related)}
        return out

    def _model_inputs(self, inputs: dict[str, Tensor]) -> ModelInputs:
        counts, owner = inputs["candidate_counts"], inputs["request_of_candidate"]
        nothing = cast(KeyedJaggedTensor, None)  # ids are looked up above; the body reads none
        rows = {"history": inputs.get("history_action", owner[:0]), "request": counts, "candidate": owner}
        numeric = {k: inputs.get(f"{k}_numeric", torch.empty(v.shape[0], 0, device=v.device)) for k, v in rows.items()}
        return ModelInputs(
            request_ids=nothing,
            candidate_ids=nothing,
            sequence_ids=nothing,
            history_action=rows["history"],
            history_surface=inputs.get("history_surface", owner[:0]),
            history_age=inputs.get("history_age", owner[:0].float()),
            history_numeric=numeric["history"],
            request_numeric=numeric["request"],
            candidate_numeric=numeric["candidate"],
            candidate_counts=counts,
            request_of_candidate=owner,
            history_slots=inputs.get("history_slots", owner[:0]),
            candidate_slots=inputs["candidate_slots"],
            surface_of_request=torch.zeros_like(counts),
            requests_per_surface=[counts.shape[0]],
            candidates_per_surface=[owner.shape[0]],
        )


def _packed(
    collection: EmbeddingBagCollection | EmbeddingCollection | None, features: tuple[str, ...], dtype: TableDtype
) -> PackedTables | None:
    if collection is None:
        return None
    bags = isinstance(collection, EmbeddingBagCollection)
    configs = collection.embedding_bag_configs() if bags else collection.embedding_configs()
    modules = collection.embedding_bags if bags else collection.embeddings
    tables = [PackedTable(name=c.name, weight=modules[c.name].weight, features=tuple(c.feature_names)) for c in configs]
    return PackedTables(tables=tables, dtype=dtype, features=features)


def _pooled(tables: PackedTables | None, inputs: dict[str, Tensor], level: str) -> KeyedTensor | None:
    if tables is None:
        return None
    pooled = tables.pool(inputs[f"{level}_ids"], inputs[f"{level}_lengths"])
    return KeyedTensor(keys=list(tables.features), length_per_key=list(tables.widths.values()), values=pooled)


def _jagged(values: Tensor, lengths: Tensor) -> JaggedTensor:
    offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(lengths)
    return JaggedTensor(values=values, lengths=lengths, offsets=offsets)


def export_program(model: ServingModel, example: dict[str, Tensor]) -> ExportedProgram:
    """The graph of a serving model, for any number of requests, candidates and events.

    Args:
        model: what to export.
        example: inputs of at least two requests with different, larger numbers of candidates and events.
    """
    shapes = ({name: {_AXES[name][0]: Dim.AUTO} for name in example},)
    with _exporting():
        return torch.export.export(model, (example,), dynamic_shapes=shapes, strict=False)


def compile_program(program: ExportedProgram, path: Path) -> None:
    """Write a program as native code (AOTInductor); takes tens of seconds and needs a C++ compiler."""
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def save_program(program: ExportedProgram, path: Path) -> None:
    """Write a program without its example, which torch.export would save as a pickle."""
    program.example_inputs = None
    torch.export.save(program, path)


@contextmanager
def _exporting() -> Iterator[None]:
    """Sizes 0 and 1 as any other: without this a program refuses one request, or one candidate."""
    tracer = logging.getLogger("torch.fx._symbolic_trace")
    oblivious = fx_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    with torch.no_grad(), warnings.catch_warnings(), oblivious:
        warnings.filterwarnings("ignore", message=".*KeyedTensor|.*to_dict.*")
        tracer.disabled = True
        try:
            yield
        finally:
            tracer.disabled = False
