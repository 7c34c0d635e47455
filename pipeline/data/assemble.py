"""From blocks of requests to the tensors of a batch: the one place where logs become model inputs.

Two steps. `prepare` turns the columns of a block into entries of the shape that a batch wants (ids to bags, numbers
to matrices, times to ages), once for many requests. `join_inputs` and `join_batch` put slices of prepared
blocks one after another, surface by surface; they are all that a batch costs.
"""

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
# Entries of a prepared block that are no columns of a log; a column cannot have such a name by accident.
_NUMERIC, _LABELS, _AGE = "<numeric>", "<labels>", "<age>"


def prepare(block: RequestBlock, layout: FeatureLayout) -> RequestBlock:
    """The same requests, with entries of the shape that a batch wants.

    Args:
        block: as `block_from_arrow` makes it; without labels, it serves `join_inputs` alone.
        layout: which column goes where.
    """
    scalars, candidates = block.scalars, block.candidates
    counted = block.candidate_counts
    total = int(counted.sum())
    rows = {k: scalars[k] for k in (REQUEST_ID, USER_ID, TIMESTAMP_MS) if k in scalars}
    rows[_NUMERIC] = _matrix(scalars, layout.request_numeric, len(block))
    per_candidate = {k: candidates[k] for k in layout.candidate_sequences}
    per_candidate[_NUMERIC] = _matrix(candidates, layout.candidate_numeric, total)
    if all(t in candidates for t in layout.tasks):
        per_candidate[_LABELS] = _matrix(candidates, layout.tasks, total)
        per_candidate[WEIGHT] = candidates[WEIGHT] if WEIGHT in candidates else torch.ones(total)
    return RequestBlock(
        rows,
        {k: _bag(scalars, block.lists, k, len(block)) for k in layout.request_bags + layout.request_sequences},
        counted,
        per_candidate,
        {k: _bag(candidates, block.candidate_lists, k, total) for k in layout.candidate_bags},
        block.history_lengths if layout.has_history else torch.zeros_like(counted),
        _history(block, layout),
    )


def _history(block: RequestBlock, layout: FeatureLayout) -> dict[str, Tensor]:
    if not layout.has_history:
        return {}
    history = block.history
    times = history[HISTORY_TIME_MS]
    now = torch.repeat_interleave(block.scalars[TIMESTAMP_MS], block.history_lengths, output_size=times.numel())
    return {
        **{k: history[k] for k in layout.history_sequences},
        # Eight bits suffice, yet rows are moved in words of 32 and more.
        HISTORY_ACTION: history[HISTORY_ACTION].int(),
        HISTORY_SURFACE: history[HISTORY_SURFACE].int(),
        # Differences of milliseconds are exact in double precision, not in single.
        _AGE: ((now - times).double() / 1000).clamp_min_(LEAST_AGE_S).float(),
        _NUMERIC: _matrix(history, layout.history_numeric, times.numel()),
    }


def _matrix(columns: dict[str, Tensor], names: tuple[str, ...], rows: int) -> Tensor:
    """[rows, names], NaN where there is no such column."""
    if not names or not all(n in columns for n in names):
        out = torch.full((rows, len(names)), float("nan"))
        for j, name in enumerate(names):
            if name in columns:
                out[:, j] = columns[name]
        return out
    return torch.stack([columns[n] for n in names], dim=1)


def _bag(single: dict[str, Tensor], several: dict[str, Jagged], name: str, rows: int) -> Jagged:
    """Ids of a feature, any number a row; none where the surface lacks it."""
    if name in several:
        return several[name]
    if name not in single:
        return Jagged(torch.empty(0, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64))
    values = single[name]
    there = values >= 0
    return Jagged(values if bool(there.all()) else values[there], there.long())


def join_inputs(parts: list[RequestBlock], layout: FeatureLayout) -> ModelInputs:
    """Model inputs of prepared requests, one block for each surface of the layout, in its order."""
    requests = [len(p) for p in parts]
    candidates = [p.candidates[_NUMERIC].shape[0] for p in parts]
    counts = torch.cat([p.candidate_counts for p in parts])
    lengths = torch.cat([p.history_lengths for p in parts])
    total = sum(candidates)
    sequences = [([p.history[k] for p in parts], [lengths]) for k in layout.history_sequences]
    sequences += [_pieces(parts, k, "lists") for k in layout.request_sequences]
    sequences += [([p.candidates[k] for p in parts], [counts]) for k in layout.candidate_sequences]
    has_history = layout.has_history
    return ModelInputs(
        request_ids=_keyed(
            [_pieces(parts, k, "lists") for k in layout.request_bags], layout.request_bags, sum(requests)
        ),
        candidate_ids=_keyed(
            [_pieces(parts, k, "candidate_lists") for k in layout.candidate_bags], layout.candidate_bags, total
        ),
        sequence_ids=_keyed(sequences, layout.sequence_keys, sum(requests)),
        history_action=_codes(parts, HISTORY_ACTION) if has_history else torch.empty(0, dtype=torch.int64),
        history_surface=_codes(parts, HISTORY_SURFACE) if has_history else torch.empty(0, dtype=torch.int64),
        history_age=torch.cat([p.history[_AGE] for p in parts]) if has_history else torch.empty(0),
        history_numeric=torch.cat([p.history[_NUMERIC] for p in parts]) if has_history else torch.empty(0, 0),
        request_numeric=torch.cat([p.scalars[_NUMERIC] for p in parts]),
        candidate_numeric=torch.cat([p.candidates[_NUMERIC] for p in parts]),
        candidate_counts=counts,
        request_of_candidate=torch.repeat_interleave(torch.arange(counts.numel()), counts, output_size=total),
        history_slots=torch.arange(int(lengths.max()) if lengths.numel() else 0),
        candidate_slots=torch.arange(int(counts.max()) if counts.numel() else 0),
        surface_of_request=torch.repeat_interleave(torch.arange(len(parts)), torch.tensor(requests)),
        requests_per_surface=requests,
        candidates_per_surface=candidates,
    )


def join_batch(parts: list[RequestBlock], layout: FeatureLayout) -> Batch:
    """A batch of prepared requests with labels; see `join_inputs`."""
    labels = torch.cat([p.candidates[_LABELS] for p in parts])
    weights = torch.cat([p.candidates[WEIGHT] for p in parts])
    mask = ~labels.isnan()
    return Batch(
        inputs=join_inputs(parts, layout),
        labels=labels.nan_to_num_(0.0),
        label_mask=mask,
        weights=weights,
        request_id=torch.cat([p.scalars[REQUEST_ID] for p in parts]),
        user_id=torch.cat([p.scalars[USER_ID] for p in parts]),
        timestamp_ms=torch.cat([p.scalars[TIMESTAMP_MS] for p in parts]),
        task_normalizer=(mask * weights[:, None]).sum(0),
    )


def assemble_inputs(blocks: dict[str, RequestBlock], layout: FeatureLayout) -> ModelInputs:
    """Model inputs of a batch.

    Args:
        blocks: requests of each surface of the layout; a block may be empty.
        layout: which column goes where.
    """
    return join_inputs([prepare(blocks[s], layout) for s in layout.surfaces], layout)


def assemble_batch(blocks: dict[str, RequestBlock], layout: FeatureLayout) -> Batch:
    """A batch with labels; see `assemble_inputs`."""
    return join_batch([prepare(blocks[s], layout) for s in layout.surfaces], layout)


def _codes(parts: list[RequestBlock], name: str) -> Tensor:
    return torch.cat([p.history[name] for p in parts]).long()


def _pieces(parts: list[RequestBlock], name: str, where: str) -> tuple[list[Tensor], list[Tensor]]:
    found: list[Jagged] = [getattr(p, where)[name] for p in parts]
    return [j.values for j in found], [j.lengths for j in found]


def _keyed(columns: list[tuple[list[Tensor], list[Tensor]]], keys: tuple[str, ...], stride: int) -> KeyedJaggedTensor:
    """Values and lengths of each key, given in pieces, copied once."""
    nothing = torch.empty(0, dtype=torch.int64)
    return KeyedJaggedTensor(
        keys=list(keys),
        values=torch.cat([piece for values, _ in columns for piece in values] or [nothing]).long(),
        lengths=torch.cat([piece for _, lengths in columns for piece in lengths] or [nothing]),
        stride=stride,
    )
