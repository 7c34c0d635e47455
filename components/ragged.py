"""Rows of unequal length: padding, broadcasting from request to candidate, cutting by surface.

Shape letters: R requests, C candidates, M most candidates of one request, L longest row, S surfaces, D width.
Lengths travel as the length of a tensor or as Python ints of the loader, never by `.item()`, so that nothing
waits for the device and an exported program stays dynamic.

Example:
    >>> import torch
    >>> offsets = offsets_of(torch.tensor([2, 0, 1]))
    >>> offsets.tolist()
    [0, 2, 2, 3]
    >>> pad_rows(torch.tensor([[1.0], [2.0], [3.0]]), offsets, 2)[..., 0].tolist()
    [[1.0, 2.0], [0.0, 0.0], [3.0, 0.0]]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torchrec.sparse.jagged_tensor  # noqa: F401  registers the fbgemm operators
from torch import Tensor


def offsets_of(lengths_R: Tensor) -> Tensor:
    """Start of every row and, last, the total: int64 [R + 1]."""
    return torch.ops.fbgemm.asynchronous_complete_cumsum(lengths_R)


def pad_rows(values: Tensor, offsets: Tensor, length: int) -> Tensor:
    """Jagged [sum, D] to dense [R, length, D]; what is missing is 0 and gets no gradient."""
    return torch.ops.fbgemm.jagged_to_padded_dense(values, [offsets], [length], 0.0)


def unpad_rows(padded_RMD: Tensor, offsets: Tensor, row_of_value: Tensor) -> Tensor:
    """The inverse of `pad_rows` for values whose row is known: dense [R, M, D] to [C, D].

    Args:
        padded_RMD: dense rows.
        offsets: int64 [R + 1], as given to `pad_rows`.
        row_of_value: int64 [C], row of each value.
    """
    place = torch.arange(row_of_value.shape[0], device=padded_RMD.device) - offsets.index_select(0, row_of_value)
    return padded_RMD.flatten(0, 1).index_select(0, row_of_value * padded_RMD.shape[1] + place)


class JaggedRows:
    """Which row each of H jagged values belongs to, made once and used by every layer that pads them.

    Args:
        lengths_R: int64 [R], values of each row, adding up to H.
        values: H.
        slots: L, at least the longest row.
    """

    def __init__(self, lengths_R: Tensor, *, values: int, slots: int) -> None:
        self.offsets, self.slots = offsets_of(lengths_R), slots
        self.place_H = torch.arange(values, device=lengths_R.device)
        self.row_H = torch.searchsorted(self.offsets[1:].contiguous(), self.place_H, right=True)

    def from_last(self) -> Tensor:
        """Int64 [H], how many values of its row come after each value."""
        return self.offsets.index_select(0, self.row_H + 1) - 1 - self.place_H

    def pad(self, values_HD: Tensor) -> Tensor:
        """[H, D] to [R, L, D], zeros behind the last value of a row."""
        return pad_rows(values_HD, self.offsets, self.slots)

    def unpad(self, padded_RLD: Tensor) -> Tensor:
        """[R, L, D] to [H, D]; the gradient of what is padding is 0."""
        return unpad_rows(padded_RLD, self.offsets, self.row_H)


def row_mask(lengths_R: Tensor, slots_L: Tensor) -> Tensor:
    """Bool [R, L]: whether slot l of row r holds a value."""
    return slots_L.unsqueeze(0) < lengths_R.unsqueeze(1)


def one_hot(codes: Tensor, size: int, *, dtype: torch.dtype) -> Tensor:
    """[N] codes in [0, size) to [N, size]: 1 at the code, 0 elsewhere.

    Unlike `torch.nn.functional.one_hot` it reads no value back from the device. A code out of range is the error of
    `scatter`: IndexError or RuntimeError on CPU, a failed assertion on CUDA.
    """
    zeros = torch.zeros(codes.shape[0], size, dtype=dtype, device=codes.device)
    return zeros.scatter(1, codes.long().unsqueeze(1), 1.0)


def split_surfaces(rows: Tensor, rows_per_surface: Sequence[int], surfaces: int) -> list[Tensor]:
    """Cut rows that lie surface by surface into one slice a surface; slices may be empty.

    With one surface the counts are not read, so that an exported program does not freeze them.

    Raises:
        ValueError: the counts do not name every surface, or do not add up to the rows.
    """
    if surfaces == 1:
        return [rows]
    if len(rows_per_surface) != surfaces:
        raise ValueError(f"got row counts of {len(rows_per_surface)} surfaces; the module has {surfaces}")
    if sum(rows_per_surface) != rows.shape[0]:
        raise ValueError(f"row counts {list(rows_per_surface)} add up to {sum(rows_per_surface)}, not {rows.shape[0]}")
    return list(torch.split(rows, list(rows_per_surface)))
