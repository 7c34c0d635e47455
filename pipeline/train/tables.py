"""First values of embedding tables, the same for every plan and number of ranks.

Each element is a hash of (seed, table, row, column), so a rank fills the shard it holds without talking to
anyone, and two plans of the same table start from the same weights.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor

_GAMMA = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
# Elements hashed at a time: bounds the int64 work space beside a large table.
_CHUNK = 1 << 22


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical shift right; torch shifts int64 arithmetically."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def hashed_uniform(
    *, seed: int, table: str, rows: tuple[int, int], columns: tuple[int, int], dim: int, device: torch.device
) -> Tensor:
    """Uniform numbers in [-1, 1) of a table's rows [r0, r1) and columns [c0, c1).

    SplitMix64 (Steele et al. 2014, "Fast splittable pseudorandom number generators") of the element's index.

    Args:
        seed: of the run.
        table: name of the table.
        rows, columns: the part to make.
        dim: columns of the whole table.
        device: where to make it.
    """
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{table}".encode(), digest_size=8).digest(), "little")
    row = torch.arange(*rows, dtype=torch.int64, device=device)
    column = torch.arange(*columns, dtype=torch.int64, device=device)
    z = (row[:, None] * dim + column[None, :] + 1) * _signed(_GAMMA) + _signed(key)
    z = (z ^ _shift(z, 30)) * _signed(_MIX[0])
    z = (z ^ _shift(z, 27)) * _signed(_MIX[1])
    z = z ^ _shift(z, 31)
    # 24 bits are exact in float32.
    return _shift(z, 40).float() * (2.0 / (1 << 24)) - 1.0


def fill_tables(module: nn.Module, *, seed: int, scale: float | None) -> None:
    """Set every embedding table of a module, sharded or not, to its first values.

    Args:
        module: its state dict names tables as `...embedding_bags.TABLE.weight` or `...embeddings.TABLE.weight`.
        seed: of the run.
        scale: values lie in [-scale, scale); None for 1 / sqrt(rows) of each table.
    """
    with torch.no_grad():
        for name, value in module.state_dict().items():
            table = table_of(name)
            if table is None:
                continue
            bound = value.size(0) ** -0.5 if scale is None else scale
            if isinstance(value, ShardedTensor):
                for shard in value.local_shards():
                    r, c = shard.metadata.shard_offsets
                    _fill(shard.tensor, seed=seed, table=table, row=r, column=c, dim=value.size(1), scale=bound)
            else:
                _fill(value, seed=seed, table=table, row=0, column=0, dim=value.size(1), scale=bound)


def table_of(parameter: str) -> str | None:
    """The table that a parameter's name belongs to; None for dense parameters.

    >>> table_of("model.embeddings.sequences.embeddings.item.weight")
    'item'
    """
    parts = parameter.split(".")
    if len(parts) >= 3 and parts[-1] == "weight" and parts[-3] in ("embedding_bags", "embeddings"):
        return parts[-2]
    return None


def _fill(out: Tensor, *, seed: int, table: str, row: int, column: int, dim: int, scale: float) -> None:
    count, width = out.shape
    step = max(_CHUNK // max(width, 1), 1)
    for start in range(0, count, step):
        stop = min(start + step, count)
        values = hashed_uniform(
            seed=seed,
            table=table,
            rows=(row + start, row + stop),
            columns=(column, column + width),
            dim=dim,
            device=out.device,
        )
        out[start:stop].copy_(values.mul_(scale))
