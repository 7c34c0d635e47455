"""From a block of requests to the inputs of a program: one matrix a level and width, nothing keyed, nothing shuffled.

Training needs keyed jagged tensors, because rows of all surfaces travel between ranks. One surface on one device does
not: a feature of one value is a column of row places, absent ones pointing at the row of zeros.

Shape letters: R requests, C candidates, H events, L longest history, M most candidates of one request, K features of
one width D, V values, N numeric columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pipeline.data.assemble import LEAST_AGE_S
from pipeline.data.block import Jagged, RequestBlock
from pipeline.data.layout import FeatureLayout
from pipeline.schema import HISTORY_ACTION, HISTORY_SURFACE, HISTORY_TIME_MS, TIMESTAMP_MS, DatasetSchema
from pipeline.serve.tables import Lookup

if TYPE_CHECKING:
    from pipeline.serve.tables import PackedTables

# Inputs by the letter of their only free axis, which is the first; those of one width or list are named by a pattern:
#   request_rows_D [R, K], candidate_rows_D [C, K], history_rows_D [H, K]   int64, rows of the matrix of width D
#   listI_rows [V], listI_owner [V]                                         int64, features of several values
_AXES = {
    "request_numeric": "R",  # float32 [R, N], NaN = absent
    "candidate_numeric": "C",  # float32 [C, N], NaN = absent
    "history_numeric": "H",  # float32 [H, N], NaN = absent
    "history_action": "H",  # int64 [H]
    "history_surface": "H",  # int64 [H]
    "history_age": "H",  # float32 [H], seconds
    "history_lengths": "R",  # int64 [R]
    "history_slots": "L",  # int64 [L], 0..L-1; L at least 1
    "candidate_counts": "R",  # int64 [R]
    "candidate_slots": "M",  # int64 [M], 0..M-1
    "request_of_candidate": "C",  # int64 [C]
}
_LEVELS = {"request": "R", "candidate": "C", "history": "H"}


def free_axis(name: str) -> str:
    """The letter of an input's first axis."""
    if name in _AXES:
        return _AXES[name]
    return _LEVELS.get(name.partition("_")[0], "V")


@dataclass(frozen=True, kw_only=True)
class TensorPlan:
    """Which inputs a program has and which columns fill them; part of the signature.

    Args:
        lookups: by level (request, candidate, history): row places of features of one value.
        lists: features of several values, in the order of their inputs; for each its level and table.
        numeric: by level, names of the columns.
        has_history: whether the program reads events.
    """

    lookups: dict[str, tuple[Lookup, ...]]
    lists: dict[str, Lookup]
    numeric: dict[str, tuple[str, ...]]
    has_history: bool

    @staticmethod
    def of(layout: FeatureLayout, schema: DatasetSchema, tables: PackedTables) -> TensorPlan:
        """The plan of a surface's layout over its packed tables."""

        def single(names: tuple[str, ...]) -> tuple[Lookup, ...]:
            return tables.lookups([n for n in names if not schema.feature(n).multi_valued])

        bags = layout.request_bags + layout.candidate_bags
        return TensorPlan(
            lookups={
                "request": single(layout.request_bags + layout.request_sequences),
                "candidate": single(layout.candidate_bags + layout.candidate_sequences),
                "history": single(layout.history_sequences),
            },
            lists={n: tables.lookups([n])[0] for n in bags if schema.feature(n).multi_valued},
            numeric={
                "request": layout.request_numeric,
                "candidate": layout.candidate_numeric,
                "history": layout.history_numeric if layout.has_history else (),
            },
            has_history=layout.has_history,
        )

    def tensors(self, block: RequestBlock) -> dict[str, Tensor]:
        """The inputs of a program for checked requests of its surface."""
        counts = block.candidate_counts
        total, requests = int(counts.sum()), len(block)
        columns = {"request": block.scalars, "candidate": block.candidates, "history": block.history}
        events = block.history[HISTORY_TIME_MS].numel() if self.has_history else 0
        sizes = {"request": requests, "candidate": total, "history": events}
        out: dict[str, Tensor] = {}
        for level, lookups in self.lookups.items():
            for lookup in lookups:
                out[f"{level}_rows_{lookup.dim}"] = _places(columns[level], lookup, sizes[level])
        for i, (name, lookup) in enumerate(self.lists.items()):
            lists = block.lists.get(name) or block.candidate_lists[name]
            out[f"list{i}_rows"], out[f"list{i}_owner"] = _list(lists, lookup)
        for level, names in self.numeric.items():
            if names:
                out[f"{level}_numeric"] = _numbers(columns[level], names, sizes[level])
        if self.has_history:
            out |= _events(block)
        out["candidate_counts"] = counts
        out["candidate_slots"] = torch.arange(int(counts.max()) if requests else 0)
        out["request_of_candidate"] = torch.from_numpy(np.repeat(np.arange(requests), counts.numpy()))
        return out


def _places(columns: dict[str, Tensor], lookup: Lookup, rows: int) -> Tensor:
    """[rows, K] places; an absent id, -1, is row 0."""
    out = np.empty((rows, len(lookup.features)), np.int64)
    for j, (name, start) in enumerate(zip(lookup.features, lookup.starts, strict=True)):
        np.add(columns[name].numpy(), start, out=out[:, j], casting="same_kind")
        # Absent ids are rare: most columns are spared the second pass.
        if rows and columns[name].numpy().min() < 0:
            out[columns[name].numpy() < 0, j] = 0
    return torch.from_numpy(out)


def _list(lists: Jagged, lookup: Lookup) -> tuple[Tensor, Tensor]:
    owner = np.repeat(np.arange(lists.lengths.numel()), lists.lengths.numpy())
    values = lists.values.numpy()
    return torch.from_numpy(np.where(values < 0, 0, values + lookup.starts[0])), torch.from_numpy(owner)


def _numbers(columns: dict[str, Tensor], names: tuple[str, ...], rows: int) -> Tensor:
    out = np.empty((rows, len(names)), np.float32)
    for j, name in enumerate(names):
        out[:, j] = columns[name].numpy() if name in columns else np.nan
    return torch.from_numpy(out)


def _events(block: RequestBlock) -> dict[str, Tensor]:
    history, lengths = block.history, block.history_lengths
    age = np.repeat(block.scalars[TIMESTAMP_MS].numpy(), lengths.numpy()) - history[HISTORY_TIME_MS].numpy()
    longest = int(lengths.max()) if lengths.numel() else 0
    return {
        "history_action": history[HISTORY_ACTION].long(),
        "history_surface": history[HISTORY_SURFACE].long(),
        "history_age": torch.from_numpy(age).float().mul_(1e-3).clamp_min_(LEAST_AGE_S),
        "history_lengths": lengths,
        # One empty slot where no request has an event: compiled code divides by this length.
        "history_slots": torch.arange(max(longest, 1)),
    }
