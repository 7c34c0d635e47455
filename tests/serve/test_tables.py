"""Packed tables read as the plain ones, within the rounding of their type."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.serve.tables import Lookup, PackedTable, PackedTables, TableDtype, is_table, pack_rows, unpack_rows

DTYPES: list[TableDtype] = ["fp32", "fp16", "int8", "int4"]
# Of a row's largest value: half a step, and a step is at most 2^(1/8) times what the row needs.
ROUNDING: dict[TableDtype, float] = {
    "fp32": 0.0,
    "fp16": 2**-11,
    "int8": 2**0.125 / 127 / 2 * 1.0001,
    "int4": 2**0.125 / 7 / 2 * 1.0001,
}


def tables(dtype: TableDtype, dims: tuple[int, int] = (8, 8)) -> tuple[PackedTables, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(20, dims[0], generator=g), torch.randn(30, dims[1], generator=g)
    packed = PackedTables(
        tables=[
            PackedTable(name="a", weight=a, features=("x", "z")),
            PackedTable(name="b", weight=b, features=("y",)),
        ],
        dtype=dtype,
    )
    return packed, {"x": a, "y": b, "z": a}


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=20, deadline=None)
@given(
    dim=st.integers(1, 17),
    exponent=st.integers(-20, 8),
    seed=st.integers(0, 2**31 - 1),
)
def test_a_value_is_off_by_half_a_step_of_its_row(dtype: TableDtype, dim: int, exponent: int, seed: int) -> None:
    weight = torch.randn(5, dim, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    back = unpack_rows(pack_rows(weight, dtype), dtype, dim)
    bound = weight.abs().amax(1, keepdim=True) * ROUNDING[dtype]
    # Below the least scale, 2^-24, nothing is told apart; fp16 has its own least value.
    assert ((back - weight).abs() <= bound + 2.0**-25).all()


def test_int8_by_hand() -> None:
    """The largest value 127 needs a step of 1, which is 2^(192/8 - 24); 63.6 is nearest to 64."""
    rows = pack_rows(torch.tensor([[127.0, -63.6, 0.0]]), "int8")
    assert rows.tolist() == [[192, 127, 256 - 64, 0]]
    assert unpack_rows(rows, "int8", 3).tolist() == [[127.0, -64.0, 0.0]]


def test_int4_by_hand() -> None:
    """Two to a byte, the first in the low half, 8 for zero; an odd width leaves half a byte empty."""
    rows = pack_rows(torch.tensor([[7.0, -3.0, 1.0]]), "int4")
    assert rows.tolist() == [[192, (8 + 7) | (8 - 3) << 4, 8 + 1]]
    assert unpack_rows(rows, "int4", 3).tolist() == [[7.0, -3.0, 1.0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(8, 8), (8, 4)])
def test_gather_and_pool(dtype: TableDtype, dims: tuple[int, int]) -> None:
    packed, weights = tables(dtype, dims)
    off = {n: float(w.abs().max()) * ROUNDING[dtype] + 1e-6 for n, w in weights.items()}
    lookups = packed.lookups(["x", "y"])
    assert [lookup.features for lookup in lookups] == ([("x", "y")] if dims[0] == dims[1] else [("y",), ("x",)])
    ids = {"x": [0, 19, 3], "y": [29, 1, 7]}
    for lookup in lookups:
        columns = [torch.tensor(ids[f]) + s for f, s in zip(lookup.features, lookup.starts, strict=True)]
        values = packed.gather(torch.stack(columns, 1), lookup.dim)
        for j, name in enumerate(lookup.features):
            assert (values[:, j] - weights[name][ids[name]]).abs().max() <= off[name]
    (lookup,) = packed.lookups(["z"])
    places, owner = torch.tensor([1, 2, 5]) + lookup.starts[0], torch.tensor([0, 0, 2])
    summed = packed.pool(places, owner, 3, dims[0])
    z = weights["z"]
    torch.testing.assert_close(
        summed, torch.stack([z[1] + z[2], torch.zeros(dims[0]), z[5]]), atol=2 * off["z"], rtol=0
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_0_is_zeros(dtype: TableDtype) -> None:
    packed, _ = tables(dtype)
    assert not packed.gather(torch.tensor([[0]]), 8).any()
    assert Lookup(dim=8, features=("x",), starts=(1,)) in packed.lookups(["x"])


def test_int8_keeps_extreme_rows() -> None:
    weight = torch.tensor([[0.0] * 4, [1e-9, -1e-9, 0.0, 0.0], [-3.0, -3.0, -3.0, -3.0], [-1e3, 1e3, 0.5, 0.0]])
    rows = unpack_rows(pack_rows(weight, "int8"), "int8", 4)
    assert not rows[0].any()
    torch.testing.assert_close(rows[1:3], weight[1:3], atol=2.0**-25, rtol=0.005)
    assert (rows[3] - weight[3]).abs().max() <= 1e3 * ROUNDING["int8"]


@pytest.mark.parametrize(("value", "problem"), [(1e6, "holds 1e\\+06, too large for int8"), (float("nan"), "NaN")])
def test_values_that_cannot_be_stored(value: float, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        pack_rows(torch.tensor([[1.0, value]]), "int8")


def test_bytes_of_a_row() -> None:
    weight = torch.randn(3, 16)
    assert [pack_rows(weight, d)[0].nbytes for d in DTYPES] == [64, 32, 17, 9]


def test_every_feature_has_one_table() -> None:
    table = PackedTable(name="a", weight=torch.ones(2, 4), features=("x",))
    with pytest.raises(ValueError, match=r"reads several tables: \['x'\]"):
        PackedTables(tables=[table, table], dtype="fp32")


def test_which_tensors_are_tables() -> None:
    assert is_table("tables.rows_8")
    assert not is_table("body.trunk.deep.weight")
