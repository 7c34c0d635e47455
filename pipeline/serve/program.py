"""What an artifact computes: one surface's model as a graph, from named tensors to calibrated probabilities.

The inputs are plain tensors (`pipeline.serve.tensors`); which of them a program has depends on the features of its
surface. Everything that belongs to a request is computed at R rows.

Shape letters: R requests, C candidates (sum over requests), H history events (sum over requests), L longest history,
M most candidates of one request, K features of one width, V values, N numeric columns, T tasks.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.fx.experimental._config as fx_config
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from components.embeddings import Embedded
from components.engagement_model import EngagementModel
from components.inputs import ModelInputs
from components.ragged import offsets_of
from pipeline.data.layout import FeatureLayout
from pipeline.schema import DatasetSchema
from pipeline.serve.signature import TensorInput
from pipeline.serve.tables import PackedTable, PackedTables, TableDtype
from pipeline.serve.tensors import TensorPlan, free_axis


def input_specs(example: dict[str, Tensor]) -> tuple[TensorInput, ...]:
    """Names, dtypes and shapes of a program's inputs; the free axis, always the first, is named by a letter."""
    return tuple(
        TensorInput(name=n, dtype=str(t.dtype).removeprefix("torch."), shape=(free_axis(n), *t.shape[1:]))
        for n, t in example.items()
    )


class ServingModel(nn.Module):
    """The model of one surface with packed tables, evaluated.

    Args:
        model: built for that surface alone, its weights loaded; its tables are packed and left behind.
        layout: of that surface.
        schema: of the log, for which features have several values.
        dtype: how table values are stored.
    """

    def __init__(
        self, *, model: EngagementModel, layout: FeatureLayout, schema: DatasetSchema, dtype: TableDtype
    ) -> None:
        super().__init__()
        embeddings = model.embeddings
        self.layout = layout
        collections = (embeddings.request_bags, embeddings.candidate_bags, embeddings.sequences)
        self.tables = PackedTables(tables=[t for c in collections for t in _tables(c)], dtype=dtype)
        self.plan = TensorPlan.of(layout, schema, self.tables)
        self.body = model.body
        self.eval()

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Calibrated probabilities, float32 [C, T]."""
        return torch.sigmoid(self.body(self._embedded(inputs), self._model_inputs(inputs)).calibrated)

    def _embedded(self, inputs: dict[str, Tensor]) -> Embedded:
        layout = self.layout
        requests, candidates = inputs["candidate_counts"], inputs["request_of_candidate"]
        of_request = self._rows(inputs, "request") | self._sums(inputs, layout.request_bags, requests.shape[0])
        of_candidate = self._rows(inputs, "candidate") | self._sums(inputs, layout.candidate_bags, candidates.shape[0])
        of_event = self._rows(inputs, "history")
        ones = torch.ones_like(requests)
        return Embedded(
            request=_keyed({k: of_request[k] for k in layout.request_bags}),
            candidate=_keyed({k: of_candidate[k] for k in layout.candidate_bags}),
            sequences={k: _jagged(of_event[k], inputs["history_lengths"]) for k in layout.history_sequences}
            | {k: _jagged(of_request[k], ones) for k in layout.request_sequences}
            | {k: _jagged(of_candidate[k], requests) for k in layout.candidate_sequences},
        )

    def _rows(self, inputs: dict[str, Tensor], level: str) -> dict[str, Tensor]:
        """Rows of the features of one value, by feature."""
        found: dict[str, Tensor] = {}
        for lookup in self.plan.lookups[level]:
            values = self.tables.gather(inputs[f"{level}_rows_{lookup.dim}"], lookup.dim)
            found |= dict(zip(lookup.features, values.unbind(1), strict=True))
        return found

    def _sums(self, inputs: dict[str, Tensor], features: tuple[str, ...], rows: int) -> dict[str, Tensor]:
        """Sums of rows of the features of several values, by feature."""
        return {
            name: self.tables.pool(inputs[f"list{i}_rows"], inputs[f"list{i}_owner"], rows, self.tables.widths[name])
            for i, name in enumerate(self.plan.lists)
            if name in features
        }

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


def _tables(collection: EmbeddingBagCollection | EmbeddingCollection | None) -> list[PackedTable]:
    if collection is None:
        return []
    bags = isinstance(collection, EmbeddingBagCollection)
    configs = collection.embedding_bag_configs() if bags else collection.embedding_configs()
    modules = collection.embedding_bags if bags else collection.embeddings
    return [PackedTable(name=c.name, weight=modules[c.name].weight, features=tuple(c.feature_names)) for c in configs]


def _keyed(values: dict[str, Tensor]) -> KeyedTensor | None:
    if not values:
        return None
    widths = [v.shape[1] for v in values.values()]
    return KeyedTensor(keys=list(values), length_per_key=widths, values=torch.cat(list(values.values()), dim=1))


def _jagged(values: Tensor, lengths: Tensor) -> JaggedTensor:
    return JaggedTensor(values=values, lengths=lengths, offsets=offsets_of(lengths))


def export_program(model: ServingModel, example: dict[str, Tensor]) -> ExportedProgram:
    """The graph of a serving model, for any number of requests, candidates and events.

    Args:
        model: what to export.
        example: inputs of at least two requests with different, larger numbers of candidates and events.
    """
    shapes = ({name: {0: Dim.AUTO} for name in example},)
    with _exporting():
        return torch.export.export(model, (example,), dynamic_shapes=shapes, strict=False)


def compile_program(program: ExportedProgram, path: Path) -> None:
    """Write a program as native code (AOTInductor); takes tens of seconds and needs a C++ compiler.

    Raises:
        OSError: the disk is full or gone.
    """
    with _archive(path) as file:
        torch._inductor.aoti_compile_and_package(program, package_path=file)


def save_program(program: ExportedProgram, path: Path) -> None:
    """Write a program without its example, which torch.export would save as a pickle.

    Raises:
        OSError: the disk is full or gone.
    """
    program.example_inputs = None
    with _archive(path) as file:
        torch.export.save(program, file)


class _Archive(io.FileIO):
    """A file whose writing never fails: torch's archives end the process where it does.

    Attributes:
        error: the first that writing met; nothing is written after it.
    """

    error: OSError | None = None

    def write(self, data: Any) -> int:
        """Take all of the data, or keep the error."""
        left = memoryview(data).cast("B")
        size = left.nbytes
        try:
            while left and self.error is None:
                left = left[super().write(left) :]
        except OSError as error:
            self.error = error
        return size


@contextmanager
def _archive(path: Path) -> Iterator[_Archive]:
    with _Archive(path, "w") as file:
        yield file
        if file.error is not None:
            raise file.error


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
