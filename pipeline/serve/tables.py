"""Embedding tables as an artifact holds them: all tables of one collection in one buffer, read by one fbgemm operator.

A row is stored as int8, fp16 or fp32, padded to 4 bytes. An int8 row of D values is

    scale (fp16), bias (fp16), q_1..q_D (uint8);   w_i = scale * q_i + bias

with bias the row's least value and scale its range over 255, both rounded to fp16 before the q_i are chosen, so that
a value is off by at most half a scale. This is the row-wise scheme of fbgemm's inference operators (Khudia et al.,
"FBGEMM: Enabling High-Performance Low-Precision Deep Learning Inference", 2021), which is called directly: TorchRec's
quantised collections hold a script object, which torch.export can only save as a pickle.

Shape letters: V values, F features, B rows, D embedding dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torchrec.sparse.jagged_tensor  # noqa: F401  registers the fbgemm operators
from torch import Tensor, nn

TableDtype = Literal["int8", "fp16", "fp32"]
# How fbgemm numbers the types of weights and outputs (SparseType.as_int) and the ways of pooling (PoolingMode).
_TYPES: dict[TableDtype, int] = {"fp32": 0, "fp16": 1, "int8": 2}
_FP32_OUTPUT, _SUM, _NONE = 0, 0, 2
_HOST = 3  # where the rows lie (EmbeddingLocation): the CPU operator reads no other place
ROW_BYTES = 4  # rows start at multiples of this; the CPU operator needs no more
_SMALLEST_SCALE = 2.0**-24  # the least fp16 above 0


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
    """Rows as bytes: float32 [rows, D] to uint8 [rows, bytes of a row, a multiple of 4]."""
    weight = weight.detach().float().cpu()
    if dtype == "int8":
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        bias = low.half()
        # Rounded up, and measured from the rounded bias, so that 255 steps still reach the highest value.
        scale = ((high - bias.float()) / 255 * (1 + 2.0**-10)).clamp_min(_SMALLEST_SCALE).half()
        steps = ((weight - bias.float()) / scale.float()).round().clamp(0, 255).to(torch.uint8)
        rows = torch.cat([torch.cat([scale, bias], 1).view(torch.uint8), steps], 1)
    else:
        rows = (weight.half() if dtype == "fp16" else weight).contiguous().view(torch.uint8)
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % ROW_BYTES)).contiguous()


class PackedTables(nn.Module):
    """Tables of one collection; features are read in the order in which they are named here.

    Args:
        tables: the tables; for `gather` all of the same D.
        dtype: how values are stored.
        features: order of the features in inputs and outputs; each reads exactly one table.

    Raises:
        ValueError: no feature, or one that no table or several tables name.
    """

    weights: Tensor
    starts: Tensor
    types: Tensor
    dims: Tensor
    placements: Tensor
    elsewhere: Tensor

    def __init__(self, *, tables: Sequence[PackedTable], dtype: TableDtype, features: Sequence[str]) -> None:
        super().__init__()
        table_of = {f: t for t in tables for f in t.features}
        if sorted(table_of) != sorted(f for t in tables for f in t.features) or set(table_of) != set(features):
            raise ValueError(f"tables read features {sorted(table_of)}, which must be just {sorted(features)}")
        if not features:
            raise ValueError("features is empty; tables without a feature have no use")
        self.features, self.dtype = tuple(features), dtype
        self.widths = {f: int(table_of[f].weight.shape[1]) for f in features}
        packed = {t.name: pack_rows(t.weight, dtype) for t in tables}
        start, starts = 0, {}
        for name, rows in packed.items():
            starts[name] = start
            start += rows.numel()
        bounds = torch.tensor([0, *self.widths.values()]).cumsum(0)
        self.total_dim = int(bounds[-1])
        self.register_buffer("weights", torch.cat([rows.flatten() for rows in packed.values()]))
        self.register_buffer("starts", torch.tensor([starts[table_of[f].name] for f in features], dtype=torch.int64))
        self.register_buffer("types", torch.full((len(features),), _TYPES[dtype], dtype=torch.uint8))
        self.register_buffer("dims", bounds.int())
        self.register_buffer("placements", torch.full((len(features),), _HOST, dtype=torch.int32))
        self.register_buffer("elsewhere", torch.empty(0, dtype=torch.uint8))

    def pool(self, ids: Tensor, lengths: Tensor, features: Sequence[str] | None = None) -> Tensor:
        """Sums of rows, float32 [B, sum of D], features side by side.

        Args:
            ids: int64 [V], feature by feature and row by row.
            lengths: int64 [F * B], ids of each feature and row.
            features: F names that follow each other in this module's order; None for all.
        """
        features = features or self.features
        first = self.features.index(features[0])
        offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(lengths)
        return self._lookup(ids, offsets, pooling=_SUM, first=first, last=first + len(features))

    def gather(self, ids: Tensor, features: Sequence[str]) -> Tensor:
        """Rows one by one.

        Args:
            ids: int64 [K, V], the ids of K features, as many each.
            features: K names that follow each other in this module's order.

        Returns:
            float32 [K, V, D].
        """
        first = self.features.index(features[0])
        offsets = torch.arange(len(features) + 1, device=ids.device) * ids.shape[1]
        rows = self._lookup(ids.flatten(), offsets, pooling=_NONE, first=first, last=first + len(features))
        return rows.unflatten(0, (len(features), ids.shape[1]))

    def _lookup(self, ids: Tensor, offsets: Tensor, *, pooling: int, first: int, last: int) -> Tensor:
        width = max(self.widths.values())
        return torch.ops.fbgemm.int_nbit_split_embedding_codegen_lookup_function(
            dev_weights=self.weights,
            uvm_weights=self.elsewhere,
            weights_placements=self.placements[first:last],
            weights_offsets=self.starts[first:last],
            weights_tys=self.types[first:last],
            D_offsets=self.dims[first : last + 1] - self.dims[first],
            total_D=sum(list(self.widths.values())[first:last]),
            max_int2_D=0,
            max_int4_D=0,
            max_int8_D=width if self.dtype == "int8" else 0,
            max_float16_D=width if self.dtype == "fp16" else 0,
            max_float32_D=width if self.dtype == "fp32" else 0,
            indices=ids,
            offsets=offsets,
            pooling_mode=pooling,
            indice_weights=None,
            output_dtype=_FP32_OUTPUT,
            row_alignment=ROW_BYTES,
        )
