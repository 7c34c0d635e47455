"""Embedding tables as an artifact holds them: tables of one width in one matrix, read by plain tensor operators.

A row is stored as fp32, fp16, int8 or int4. A quantised row of D values is one byte c and D signed integers q:

    w_i = 2^(c / 8 - 24) * q_i,    |q_i| <= 127 (int8) or 7 (int4, two to a byte, stored as q + 8)

with c the least that reaches the row's largest value, so that a value is off by at most half a step of its own row,
and a step is at most 2^(1/8) times what the row needs. One byte of scale a row is what makes int8 rows of 16 values
3.8 times smaller than fp32; a scale and a bias in fp16, as in fbgemm's inference operators (Khudia et al., "FBGEMM:
Enabling High-Performance Low-Precision Deep Learning Inference", 2021), give 3.2. The grid of scales is fixed, so a
row's bytes depend on that row alone, which is what lets a delta hold changed rows only.

Row 0 of each matrix is zeros: an absent id reads it.

Shape letters: B rows of a batch, K features, V values, D embedding dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

TableDtype = Literal["int8", "int4", "fp16", "fp32"]
_LARGEST = {"int8": 127, "int4": 7}
_STEPS, _LOWEST = 8, -24  # codes of an octave, and the exponent of code 0


@dataclass(frozen=True, kw_only=True)
class PackedTable:
    """One table and the features that read it.

    Args:
        name: of the table (vocabulary).
        weight: float32 [rows, D].
        features: names of the features that look ids up in it.
    """

    name: str
    weight: Tensor
    features: tuple[str, ...]


def pack_rows(weight: Tensor, dtype: TableDtype) -> Tensor:
    """Rows as they are stored, [rows, ...]: float32 or float16 [rows, D], or bytes.

    Raises:
        ValueError: a value is not finite, or too large for a quantised row.
    """
    weight = weight.detach().float().cpu()
    if not bool(weight.isfinite().all()):
        raise ValueError("a table holds NaN or infinity; the training run has diverged")
    if dtype == "fp32":
        return weight.clone()
    if dtype == "fp16":
        return weight.half()
    most = _LARGEST[dtype]
    needed = weight.abs().amax(1, keepdim=True) / most
    code = ((needed.log2() - _LOWEST) * _STEPS).ceil().clamp_min(0.0)
    if code.numel() and float(code.max()) > 255:
        largest = float(weight.abs().max())
        raise ValueError(f"a table holds {largest:g}, too large for {dtype}; export with fp16 or fp32")
    steps = (weight / _scale(code)).round().clamp(-most, most)
    if dtype == "int8":
        return torch.cat([code.to(torch.uint8), steps.to(torch.int8).view(torch.uint8)], 1)
    nibbles = torch.nn.functional.pad((steps + 8).to(torch.uint8), (0, weight.shape[1] % 2))
    return torch.cat([code.to(torch.uint8), nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)], 1)


def unpack_rows(rows: Tensor, dtype: TableDtype, dim: int) -> Tensor:
    """Stored rows [V, ...] as values, float32 [V, dim]."""
    if dtype == "fp32":
        return rows
    if dtype == "fp16":
        return rows.float()
    scale = _scale(rows[:, :1].float())
    if dtype == "int8":
        return rows[:, 1:].view(torch.int8).float() * scale
    pairs = rows[:, 1:]
    # By name: `&` is exported as an operation that vetting does not know.
    nibbles = torch.stack([torch.bitwise_and(pairs, 15), torch.bitwise_right_shift(pairs, 4)], 2).flatten(1)[:, :dim]
    return (nibbles.float() - 8) * scale


def _scale(code: Tensor) -> Tensor:
    return torch.exp2(code / _STEPS + _LOWEST)


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """One input of row places: which features its columns hold, and where their tables begin.

    Args:
        dim: D, and so the matrix.
        features: one a column.
        starts: row of id 0 of each feature's table.
    """

    dim: int
    features: tuple[str, ...]
    starts: tuple[int, ...]


class PackedTables(nn.Module):
    """All tables of an artifact. Id i of a table lies in row `start of the table + i` of the matrix of its width.

    Args:
        tables: the tables.
        dtype: how values are stored.

    Raises:
        ValueError: a feature that several tables name, or values that cannot be stored.
    """

    def __init__(self, *, tables: Sequence[PackedTable], dtype: TableDtype) -> None:
        super().__init__()
        self.dtype = dtype
        names = [f for t in tables for f in t.features]
        if len(set(names)) < len(names):
            raise ValueError(f"a feature reads several tables: {sorted(n for n in set(names) if names.count(n) > 1)}")
        self.widths = {f: int(t.weight.shape[1]) for t in tables for f in t.features}
        self.starts: dict[str, int] = {}
        for dim in sorted(set(self.widths.values())):
            parts = [pack_rows(torch.zeros(1, dim), dtype)]
            for table in tables:
                if table.weight.shape[1] == dim:
                    self.starts |= dict.fromkeys(table.features, sum(p.shape[0] for p in parts))
                    parts.append(pack_rows(table.weight, dtype))
            self.register_buffer(f"rows_{dim}", torch.cat(parts))

    @property
    def bytes(self) -> int:
        """Size of all rows."""
        return sum(b.nbytes for b in self.buffers())

    def lookups(self, features: Sequence[str]) -> tuple[Lookup, ...]:
        """The inputs that these features need, one a width."""
        found = []
        for dim in sorted({self.widths[f] for f in features}):
            columns = tuple(f for f in features if self.widths[f] == dim)
            found.append(Lookup(dim=dim, features=columns, starts=tuple(self.starts[f] for f in columns)))
        return tuple(found)

    def gather(self, places: Tensor, dim: int) -> Tensor:
        """Rows [B, K] (int64) of the matrix of width D as values, float32 [B, K, D]."""
        rows = self.get_buffer(f"rows_{dim}").index_select(0, places.flatten())
        return unpack_rows(rows, self.dtype, dim).view(*places.shape, dim)

    def pool(self, places: Tensor, owner: Tensor, rows: int, dim: int) -> Tensor:
        """Sums of the rows of a feature of several values, float32 [rows, D]; zeros without a value.

        Args:
            places: int64 [V], rows of the matrix of width D.
            owner: int64 [V], which row of the result each belongs to.
            rows: of the result.
            dim: D.
        """
        values = self.gather(places[:, None], dim).squeeze(1)
        return values.new_zeros(rows, dim).index_add(0, owner, values)


def is_table(name: str) -> bool:
    """Whether a program's tensor of this name is a matrix of packed tables."""
    return name.startswith("tables.rows_")
