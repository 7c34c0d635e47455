"""From blocks of requests to the tensors of a batch: the one place where logs become model inputs."""

from __future__ import annotations

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from components.inputs import ModelInputs
from pipeline.data.batch import Batch
from pipeline.data.block import Jagged, RequestBlock
from pipeline.data.layout import FeatureLayout
from pipeline.schema import (
    HISTORY_ACTION,
    HISTORY_SURFACE,
    HISTORY_TIME_MS,
    REQUEST_ID,
    TIMESTAMP_MS,
    USER_ID,
    WEIGHT,
)

# The least age of an event, in seconds: an age enters the model by its logarithm.
LEAST_AGE_S = 1e-3


def assemble_inputs(blocks: dict[str, RequestBlock], layout: FeatureLayout) -> ModelInputs:
    """Model inputs of a batch.

    Args:
        blocks: requests of each surface of the layout; a block may be empty.
        layout: which column goes where.
    """
    parts = [blocks[s] for s in layout.surfaces]
    requests = [len(p) for p in parts]
    counts = torch.cat([p.candidate_counts for p in parts])
    total = int(counts.sum())
    row = torch.arange(counts.numel())
    history = _History(parts, layout)
    return ModelInputs(
        request_ids=_keyed([_request_ids(parts, k) for k in layout.request_bags], layout.request_bags, sum(requests)),
        candidate_ids=_keyed([_candidate_ids(parts, k) for k in layout.candidate_bags], layout.candidate_bags, total),
        sequence_ids=_keyed(
            [history.ids(k) for k in layout.history_sequences]
            + [_request_ids(parts, k) for k in layout.request_sequences]
            + [Jagged(torch.cat([p.candidates[k] for p in parts]), counts) for k in layout.candidate_sequences],
            layout.sequence_keys,
            sum(requests),
        ),
        history_action=history.codes(HISTORY_ACTION),
        history_surface=history.codes(HISTORY_SURFACE),
        history_age=history.ages(),
        history_numeric=history.numeric(),
        request_numeric=_numeric([[p.scalars.get(k) for p in parts] for k in layout.request_numeric], requests),
        candidate_numeric=_numeric(
            [[p.candidates.get(k) for p in parts] for k in layout.candidate_numeric],
            [int(p.candidate_counts.sum()) for p in parts],
        ),
        candidate_counts=counts,
        request_of_candidate=torch.repeat_interleave(row, counts, output_size=total),
        history_slots=torch.arange(int(history.lengths.max()) if history.lengths.numel() else 0),
        candidate_slots=torch.arange(int(counts.max()) if counts.numel() else 0),
        surface_of_request=torch.repeat_interleave(torch.arange(len(parts)), torch.tensor(requests)),
        requests_per_surface=requests,
        candidates_per_surface=[int(p.candidate_counts.sum()) for p in parts],
    )


def assemble_batch(blocks: dict[str, RequestBlock], layout: FeatureLayout) -> Batch:
    """A batch with labels; see `assemble_inputs`."""
    parts = [blocks[s] for s in layout.surfaces]
    labels = torch.stack([torch.cat([p.candidates[t] for p in parts]) for t in layout.tasks], dim=1)
    mask = ~labels.isnan()
    weights = torch.cat([p.candidates.get(WEIGHT, torch.ones(int(p.candidate_counts.sum()))) for p in parts])
    return Batch(
        inputs=assemble_inputs(blocks, layout),
        labels=labels.nan_to_num(0.0),
        label_mask=mask,
        weights=weights,
        request_id=torch.cat([p.scalars[REQUEST_ID] for p in parts]),
        user_id=torch.cat([p.scalars[USER_ID] for p in parts]),
        timestamp_ms=torch.cat([p.scalars[TIMESTAMP_MS] for p in parts]),
        task_normalizer=(mask * weights[:, None]).sum(0),
    )


class _History:
    """History columns of a batch; all empty where the layout has none."""

    def __init__(self, parts: list[RequestBlock], layout: FeatureLayout) -> None:
        self.parts = parts
        self.layout = layout
        self.lengths = (
            torch.cat([p.history_lengths for p in parts])
            if layout.has_history
            else torch.zeros(sum(len(p) for p in parts), dtype=torch.int64)
        )

    def ids(self, name: str) -> Jagged:
        return Jagged(torch.cat([p.history[name] for p in self.parts]), self.lengths)

    def codes(self, name: str) -> Tensor:
        if not self.layout.has_history:
            return torch.empty(0, dtype=torch.int64)
        return torch.cat([p.history[name] for p in self.parts]).long()

    def ages(self) -> Tensor:
        if not self.layout.has_history:
            return torch.empty(0)
        now = torch.cat([p.scalars[TIMESTAMP_MS] for p in self.parts])
        then = torch.cat([p.history[HISTORY_TIME_MS] for p in self.parts])
        of_event = torch.repeat_interleave(now, self.lengths, output_size=then.numel())
        return ((of_event - then).double() / 1000).clamp_min(LEAST_AGE_S).float()

    def numeric(self) -> Tensor:
        names = self.layout.history_numeric
        if not names:
            return torch.empty(int(self.lengths.sum()), 0)
        return torch.stack([torch.cat([p.history[n] for p in self.parts]) for n in names], dim=1)


def _present(values: Tensor) -> Jagged:
    """Zero or one id a row; ABSENT ids leave an empty row."""
    there = values >= 0
    return Jagged(values[there], there.long())


def _request_ids(parts: list[RequestBlock], name: str) -> Jagged:
    rows = []
    for p in parts:
        if name in p.scalars:
            rows.append(_present(p.scalars[name]))
        else:
            rows.append(p.lists.get(name) or _nothing(len(p)))
    return Jagged.cat(rows)


def _candidate_ids(parts: list[RequestBlock], name: str) -> Jagged:
    rows = []
    for p in parts:
        if name in p.candidates:
            rows.append(_present(p.candidates[name]))
        else:
            rows.append(p.candidate_lists.get(name) or _nothing(int(p.candidate_counts.sum())))
    return Jagged.cat(rows)


def _nothing(rows: int) -> Jagged:
    return Jagged(torch.empty(0, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64))


def _keyed(parts: list[Jagged], keys: tuple[str, ...], stride: int) -> KeyedJaggedTensor:
    if not keys:
        return KeyedJaggedTensor(
            keys=[],
            values=torch.empty(0, dtype=torch.int64),
            lengths=torch.empty(0, dtype=torch.int64),
            stride=stride,
        )
    return KeyedJaggedTensor(
        keys=list(keys),
        values=torch.cat([p.values for p in parts]),
        lengths=torch.cat([p.lengths for p in parts]),
        stride=stride,
    )


def _numeric(columns: list[list[Tensor | None]], rows: list[int]) -> Tensor:
    """[rows, columns], NaN where a surface lacks a column."""
    out = torch.full((sum(rows), len(columns)), float("nan"))
    for j, parts in enumerate(columns):
        start = 0
        for part, count in zip(parts, rows, strict=True):
            if part is not None:
                out[start : start + count, j] = part
            start += count
    return out
