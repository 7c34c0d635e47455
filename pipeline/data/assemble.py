"""From blocks of requests to the tensors of a batch: the one place where logs become model inputs.

Two steps. `prepare` packs the columns of a block into a few tensors (ids and numbers of a level to one matrix, times
to ages), once for many requests; these few are shuffled and cut. `join_inputs` and `join_batch` put pieces
of prepared blocks one after another, surface by surface, which is all that a batch costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from components.inputs import ModelInputs
from pipeline.data.batch import Batch
from pipeline.data.block import Jagged, RequestBlock
from pipeline.data.columns import ABSENT
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
# Entries of a prepared block. Matrices have one column for each name, absent ids are -1, absent numbers NaN.
_IDENTITY, _IDS, _NUMBERS, _CODES, _AGE = "<identity>", "<ids>", "<numbers>", "<codes>", "<age>"
_SURFACE_BITS = 8  # of an entry of _CODES; the rest is the action

# Values and lengths of one key, each in pieces.
_Pieces = tuple[Sequence[Tensor], Sequence[Tensor]]


def prepare(block: RequestBlock, layout: FeatureLayout, id_type: torch.dtype = torch.int64) -> RequestBlock:
    """The same requests in few tensors.

    Args:
        block: as `block_from_arrow` makes it; without labels, it serves `join_inputs` alone.
        layout: which column goes where.
        id_type: of all ids of the batch; int32 halves what is moved, here, to the device and between ranks, where all
            ids fit. TorchRec widens them where it looks them up.
    """
    scalars, candidates = block.scalars, block.candidates
    counts = block.candidate_counts
    total = int(counts.sum())
    labelled = (*layout.tasks, WEIGHT) if all(t in candidates for t in layout.tasks) else ()
    weights = {} if WEIGHT in candidates else {WEIGHT: torch.ones(total)}
    lists = {k: block.lists[k].to(id_type) for k in layout.request_bags if k in block.lists}
    candidate_lists = {
        k: block.candidate_lists[k].to(id_type) for k in layout.candidate_bags if k in block.candidate_lists
    }
    return RequestBlock(
        {
            _IDENTITY: _matrix(scalars, (REQUEST_ID, USER_ID, TIMESTAMP_MS), len(block), torch.int64),
            _IDS: _matrix(scalars, layout.request_bags + layout.request_sequences, len(block), id_type),
            _NUMBERS: _matrix(scalars, layout.request_numeric, len(block), torch.float32),
        },
        lists,
        counts,
        {
            _IDS: _matrix(candidates, layout.candidate_bags + layout.candidate_sequences, total, id_type),
            _NUMBERS: _matrix(candidates | weights, layout.candidate_numeric + labelled, total, torch.float32),
        },
        candidate_lists,
        block.history_lengths if layout.has_history else torch.zeros_like(counts),
        _history(block, layout, id_type) if layout.has_history else {},
    )


def _history(block: RequestBlock, layout: FeatureLayout, id_type: torch.dtype) -> dict[str, Tensor]:
    history = block.history
    events = history[HISTORY_TIME_MS].numel()
    prepared = {k: history[k].to(id_type) for k in layout.history_sequences}
    prepared[_CODES] = history[HISTORY_ACTION].int().bitwise_left_shift_(_SURFACE_BITS).add_(history[HISTORY_SURFACE])
    # NumPy repeats several times quicker than `torch.repeat_interleave`.
    age = np.repeat(block.scalars[TIMESTAMP_MS].numpy(), block.history_lengths.numpy())
    age -= history[HISTORY_TIME_MS].numpy()
    prepared[_AGE] = torch.from_numpy(age).float().mul_(1e-3).clamp_min_(LEAST_AGE_S)
    if layout.history_numeric:
        prepared[_NUMBERS] = _matrix(history, layout.history_numeric, events, torch.float32)
    return prepared


def _matrix(columns: dict[str, Tensor], names: tuple[str, ...], rows: int, dtype: torch.dtype) -> Tensor:
    """[rows, names]; absent where there is no such column."""
    out = torch.empty(rows, len(names), dtype=dtype)
    filled = out.numpy()  # small copies cost less through NumPy
    for j, name in enumerate(names):
        filled[:, j] = columns[name].numpy() if name in columns else torch.nan if dtype.is_floating_point else ABSENT
    return out


def join_inputs(parts: list[RequestBlock], layout: FeatureLayout) -> ModelInputs:
    """Model inputs of prepared requests, one block for each surface of the layout, in its order."""
    return _join(parts, layout)[0]


def _join(parts: list[RequestBlock], layout: FeatureLayout) -> tuple[ModelInputs, Tensor]:
    """Model inputs, and the candidates' numbers, labels and weights as one matrix."""
    requests = [len(p) for p in parts]
    candidates = [p.candidates[_IDS].shape[0] for p in parts]
    counts = torch.cat([p.candidate_counts for p in parts])
    lengths = torch.cat([p.history_lengths for p in parts])
    total = sum(candidates)
    ids = torch.cat([p.scalars[_IDS] for p in parts])
    candidate_ids = torch.cat([p.candidates[_IDS] for p in parts])
    bags, candidate_bags = len(layout.request_bags), len(layout.candidate_bags)
    action, surface, age, numeric = _events(parts, layout)
    sequences: list[_Pieces] = [([p.history[k] for p in parts], [lengths]) for k in layout.history_sequences]
    sequences += _bags(ids[:, bags:], layout.request_sequences, [p.lists for p in parts], requests)
    sequences += [([column], [counts]) for column in candidate_ids[:, candidate_bags:].unbind(1)]
    numbers = torch.cat([p.candidates[_NUMBERS] for p in parts])
    inputs = ModelInputs(
        request_ids=_keyed(
            _bags(ids[:, :bags], layout.request_bags, [p.lists for p in parts], requests),
            layout.request_bags,
            sum(requests),
        ),
        candidate_ids=_keyed(
            _bags(
                candidate_ids[:, :candidate_bags], layout.candidate_bags, [p.candidate_lists for p in parts], candidates
            ),
            layout.candidate_bags,
            total,
        ),
        sequence_ids=_keyed(sequences, layout.sequence_keys, sum(requests)),
        history_action=action,
        history_surface=surface,
        history_age=age,
        history_numeric=numeric,
        request_numeric=torch.cat([p.scalars[_NUMBERS] for p in parts]),
        candidate_numeric=numbers[:, : len(layout.candidate_numeric)].contiguous(),
        candidate_counts=counts,
        request_of_candidate=torch.from_numpy(np.repeat(np.arange(counts.numel()), counts.numpy())),
        history_slots=torch.arange(int(lengths.max()) if lengths.numel() else 0),
        candidate_slots=torch.arange(int(counts.max()) if counts.numel() else 0),
        surface_of_request=torch.repeat_interleave(torch.arange(len(parts)), torch.tensor(requests)),
        requests_per_surface=requests,
        candidates_per_surface=candidates,
    )
    return inputs, numbers


def _events(parts: list[RequestBlock], layout: FeatureLayout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Actions, surfaces, ages and numbers of all events."""
    if not layout.has_history:
        return torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.int32), torch.empty(0), torch.empty(0, 0)
    codes = torch.cat([p.history[_CODES] for p in parts])
    age = torch.cat([p.history[_AGE] for p in parts])
    numeric = torch.cat([p.history[_NUMBERS] for p in parts]) if layout.history_numeric else age.new_empty(len(age), 0)
    return codes >> _SURFACE_BITS, codes & ((1 << _SURFACE_BITS) - 1), age, numeric


def join_batch(parts: list[RequestBlock], layout: FeatureLayout) -> Batch:
    """A batch of prepared requests with labels; see `join_inputs`. Without a request it gets an inert one."""
    if not any(len(p) for p in parts):
        parts = [_inert(parts[0]), *parts[1:]]
    inputs, numbers = _join(parts, layout)
    labels = numbers[:, len(layout.candidate_numeric) : -1].contiguous()
    weights = numbers[:, -1].contiguous()
    mask = labels == labels  # NaN alone differs from itself: one pass
    identity = torch.cat([p.scalars[_IDENTITY] for p in parts]).t().contiguous()
    return Batch(
        inputs=inputs,
        labels=labels.nan_to_num_(0.0),
        label_mask=mask,
        weights=weights,
        request_id=identity[0],
        user_id=identity[1],
        timestamp_ms=identity[2],
        task_normalizer=mask.float().t() @ weights,
    )


def _inert(empty: RequestBlock) -> RequestBlock:
    """A request without user, candidates or history, for a rank that has none: TorchRec cannot exchange batches of no
    rows, and without candidates no loss and no metric sees it. Its request_id is -1."""
    nothing = torch.zeros(1, dtype=torch.int64)
    return replace(
        empty,
        scalars={
            k: v.new_full((1, v.shape[1]), torch.nan if v.is_floating_point() else ABSENT)
            for k, v in empty.scalars.items()
        },
        lists={k: Jagged(j.values, nothing) for k, j in empty.lists.items()},
        candidate_counts=nothing,
        history_lengths=nothing,
    )


def assemble_inputs(blocks: dict[str, RequestBlock], layout: FeatureLayout) -> ModelInputs:
    """Model inputs of a batch.

    Args:
        blocks: requests of each surface of the layout; a block may be empty.
        layout: which column goes where.
    """
    return join_inputs([prepare(blocks[s], layout) for s in layout.surfaces], layout)


def _bags(single: Tensor, names: tuple[str, ...], several: list[dict[str, Jagged]], rows: list[int]) -> list[_Pieces]:
    """Ids of features, any number a row: lists as they are, else zero or one from the matrix [rows, names]."""
    if not names:
        return []
    nothing = single.new_empty(0)
    found: list[_Pieces] = []
    for name, column in zip(names, single.t().contiguous(), strict=True):
        if any(name in lists for lists in several):
            pieces = [
                lists.get(name) or Jagged(nothing, torch.zeros(n, dtype=torch.int64))
                for lists, n in zip(several, rows, strict=True)
            ]
            found.append(([p.values for p in pieces], [p.lengths for p in pieces]))
        else:
            values, lengths = _present(column)
            found.append(([values], [lengths]))
    return found


def _present(column: Tensor) -> tuple[Tensor, Tensor]:
    """Ids that are not absent, and how many each row has: none or one."""
    # Masks go several times quicker through NumPy than through torch, and none at all is needed for most columns.
    ids = column.numpy()
    there = ids >= 0
    count = np.count_nonzero(there)
    if count == ids.size:
        return column, torch.ones(ids.size, dtype=torch.int64)
    return torch.from_numpy(ids[there]), torch.from_numpy(there.astype(np.int64))


def _keyed(columns: list[_Pieces], keys: tuple[str, ...], stride: int) -> KeyedJaggedTensor:
    """All pieces one after another, key by key."""
    nothing = torch.empty(0, dtype=torch.int64)
    return KeyedJaggedTensor(
        keys=list(keys),
        values=torch.cat([piece for values, _ in columns for piece in values] or [nothing]),
        lengths=torch.cat([piece for _, lengths in columns for piece in lengths] or [nothing]),
        stride=stride,
    )
