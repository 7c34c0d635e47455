"""Packed tables read as the plain ones, within the rounding of their type."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.serve.tables import PackedTable, PackedTables, TableDtype, pack_rows

ROUNDING: dict[TableDtype, float] = {"fp32": 0.0, "fp16": 2**-11, "int8": 1 / 510 * 1.01}


def tables(dtype: TableDtype, dims: tuple[int, int] = (8, 8)) -> tuple[PackedTables, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(20, dims[0], generator=g), torch.randn(30, dims[1], generator=g)
    packed = PackedTables(
        tables=[
            PackedTable(name="a", weight=a, features=("x", "z")),
            PackedTable(name="b", weight=b, features=("y",)),
        ],
        dtype=dtype,
        features=("x", "y", "z"),
    )
    return packed, {"x": a, "y": b, "z": a}


def bound(weight: Tensor, dtype: TableDtype) -> float:
    """How far a value of a row may be off: a share of the row's range, and the rounding of scale and bias."""
    span = float((weight.amax(1) - weight.amin(1)).max()) if dtype == "int8" else float(weight.abs().max())
    return span * ROUNDING[dtype] + (1e-6 if dtype == "int8" else 0.0)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8"])
def test_gather_gives_the_rows(dtype: TableDtype) -> None:
    packed, weights = tables(dtype)
    ids = {"y": torch.tensor([29, 1, 0, 7]), "z": torch.tensor([0, 19, 3, 3])}
    rows = packed.gather(torch.stack([ids["y"], ids["z"]]), ("y", "z"))
    for got, name in zip(rows, ids, strict=True):
        assert (got - weights[name][ids[name]]).abs().max() <= bound(weights[name], dtype)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8"])
def test_pool_gives_sums_and_zeros_for_nothing(dtype: TableDtype) -> None:
    packed, weights = tables(dtype, dims=(8, 4))
    ids = torch.tensor([1, 2, 5, 29, 0, 3])
    lengths = torch.tensor([2, 0, 1, 1, 1, 1])
    x, y, z = packed.pool(ids, lengths).split([8, 4, 8], dim=1)
    off = 2 * max(bound(w, dtype) for w in weights.values())
    torch.testing.assert_close(x[0], weights["x"][1] + weights["x"][2], atol=off, rtol=0)
    assert not x[1].any()
    torch.testing.assert_close(y, weights["y"][[5, 29]], atol=off, rtol=0)
    torch.testing.assert_close(z, weights["z"][[0, 3]], atol=off, rtol=0)


def test_int8_keeps_extreme_rows() -> None:
    weight = torch.tensor([[0.0] * 4, [1e-9, -1e-9, 0.0, 0.0], [-3.0, -3.0, -3.0, -3.0], [-1e3, 1e3, 0.5, 0.0]])
    packed = PackedTables(tables=[PackedTable(name="t", weight=weight, features=("f",))], dtype="int8", features=("f",))
    rows = packed.gather(torch.arange(4)[None], ("f",))[0]
    assert rows.isfinite().all()
    torch.testing.assert_close(rows[:3], weight[:3], atol=1e-6, rtol=1e-3)
    assert (rows[3] - weight[3]).abs().max() <= 2000 / 510 * 1.01


def test_bytes_of_a_row() -> None:
    weight = torch.randn(3, 16)
    assert [pack_rows(weight, d).shape[1] for d in ("int8", "fp16", "fp32")] == [20, 32, 64]


def test_every_feature_has_one_table() -> None:
    table = PackedTable(name="a", weight=torch.ones(2, 4), features=("x",))
    with pytest.raises(ValueError, match=r"must be just \['x', 'y'\]"):
        PackedTables(tables=[table], dtype="fp32", features=("x", "y"))
    with pytest.raises(ValueError, match="features is empty"):
        PackedTables(tables=[], dtype="fp32", features=())
