"""What the model eats: the tensors of one batch, as the loader draws them once.

Shape letters: R requests, C candidates (sum over requests), H history events (sum over requests),
L longest history in the batch, M most candidates of one request, N numeric features, S surfaces.
Rows lie surface by surface, in the order of the model's surfaces, so that a tower works on a slice.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


@dataclass
class ModelInputs:
    """Inputs of `EngagementModel`.

    Args:
        request_ids: pooled request features; one row a request. No keys when there is none.
        candidate_ids: pooled candidate features; one row a candidate.
        sequence_ids: ids that meet across levels (history items, candidate ids), one row a request.
            The values of a candidate-level key are exactly the C candidate ids, in order.
        history_action: int32 or int64 [H], code of each event's outcome (0 = unknown).
        history_surface: int32 or int64 [H], 0 = unknown surface, else 1 + index of the surface in the schema.
        history_age: float32 [H], seconds between event and request, above 0.
        history_numeric: float32 [H, N], NaN = absent.
        request_numeric: float32 [R, N], NaN = absent.
        candidate_numeric: float32 [C, N], NaN = absent.
        candidate_counts: int64 [R], candidates of each request.
        request_of_candidate: int64 [C], row of each candidate's request.
        history_slots: int64 [L], 0..L-1. Its length, not a value, carries L, so that nothing waits for
            the device and an exported program stays dynamic.
        candidate_slots: int64 [M], 0..M-1, likewise.
        surface_of_request: int64 [R], index in the model's surfaces.
        requests_per_surface: S ints, rows of each surface among R.
        candidates_per_surface: S ints, rows of each surface among C.
    """

    request_ids: KeyedJaggedTensor
    candidate_ids: KeyedJaggedTensor
    sequence_ids: KeyedJaggedTensor
    history_action: Tensor
    history_surface: Tensor
    history_age: Tensor
    history_numeric: Tensor
    request_numeric: Tensor
    candidate_numeric: Tensor
    candidate_counts: Tensor
    request_of_candidate: Tensor
    history_slots: Tensor
    candidate_slots: Tensor
    surface_of_request: Tensor
    requests_per_surface: list[int]
    candidates_per_surface: list[int]

    def to(self, device: torch.device, non_blocking: bool = False) -> ModelInputs:
        """The same inputs on `device`."""
        moved = {
            f.name: getattr(self, f.name).to(device=device, non_blocking=non_blocking)
            for f in fields(self)
            if not isinstance(getattr(self, f.name), list)
        }
        return replace(self, **moved)

    def pin_memory(self) -> ModelInputs:
        """The same inputs in page-locked host memory, for an asynchronous copy to the device."""
        pinned = {
            f.name: getattr(self, f.name).pin_memory()
            for f in fields(self)
            if not isinstance(getattr(self, f.name), list)
        }
        return replace(self, **pinned)

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that `stream` uses these tensors."""
        for f in fields(self):
            value = getattr(self, f.name)
            if not isinstance(value, list):
                value.record_stream(stream)
