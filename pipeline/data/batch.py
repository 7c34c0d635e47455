"""One training batch: what the model eats, what it should have said, and whose rows these are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

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

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """The same batch on `device`."""
        return replace(self, **{n: part.to(device=device, non_blocking=non_blocking) for n, part in self._parts()})

    def pin_memory(self) -> Batch:
        """The same batch in page-locked host memory."""
        return replace(self, **{name: part.pin_memory() for name, part in self._parts()})

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that `stream` uses this batch."""
        for _, part in self._parts():
            part.record_stream(stream)

    def _parts(self) -> Iterator[tuple[str, Any]]:
        return ((f.name, getattr(self, f.name)) for f in fields(self))
