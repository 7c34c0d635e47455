"""One training batch: what the model eats, what it should have said, and whose rows these are."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchrec.streamable import Pipelineable

from components.inputs import ModelInputs


@dataclass
class Batch(Pipelineable):
    """Rows of one step on one rank. R requests, C candidates, T tasks.

    Args:
        inputs: what the model eats.
        labels: float32 [C, T] in [0, 1]; 0 where not observed.
        label_mask: bool [C, T], whether the label was observed.
        weights: float32 [C].
        request_id: int64 [R].
        user_id: int64 [R].
        timestamp_ms: int64 [R].
        task_normalizer: float32 [T], what the sum of weighted losses of a task is divided by. The loader
            gives the total weight of this batch's observed labels; the trainer replaces it by the mean
            over ranks, so that the result does not depend on how rows fell to ranks.
    """

    inputs: ModelInputs
    labels: Tensor
    label_mask: Tensor
    weights: Tensor
    request_id: Tensor
    user_id: Tensor
    timestamp_ms: Tensor
    task_normalizer: Tensor

    def _map(self, move: str, *args: object, **kwargs: object) -> Batch:
        names = (
            "inputs",
            "labels",
            "label_mask",
            "weights",
            "request_id",
            "user_id",
            "timestamp_ms",
            "task_normalizer",
        )
        return replace(self, **{name: getattr(getattr(self, name), move)(*args, **kwargs) for name in names})

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """The same batch on `device`."""
        return self._map("to", device=device, non_blocking=non_blocking)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked host memory."""
        return self._map("pin_memory")

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that `stream` uses this batch."""
        self._map_in_place(stream)

    def _map_in_place(self, stream: torch.Stream) -> None:
        self.inputs.record_stream(stream)
        for tensor in (
            self.labels,
            self.label_mask,
            self.weights,
            self.request_id,
            self.user_id,
            self.timestamp_ms,
            self.task_normalizer,
        ):
            tensor.record_stream(stream)
