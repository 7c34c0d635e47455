"""First values of tables do not depend on how a table is cut."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from pipeline.train.tables import fill_tables, hashed_uniform, table_of

CPU = torch.device("cpu")


def whole(seed: int = 0, table: str = "item") -> torch.Tensor:
    return hashed_uniform(seed=seed, table=table, rows=(0, 500), columns=(0, 12), dim=12, device=CPU)


@given(r=st.tuples(st.integers(0, 499), st.integers(0, 499)), c=st.tuples(st.integers(0, 11), st.integers(0, 11)))
def test_any_shard_is_that_part_of_the_table(r: tuple[int, int], c: tuple[int, int]) -> None:
    rows, columns = (min(r), max(r) + 1), (min(c), max(c) + 1)
    shard = hashed_uniform(seed=0, table="item", rows=rows, columns=columns, dim=12, device=CPU)
    assert torch.equal(shard, whole()[rows[0] : rows[1], columns[0] : columns[1]])


def test_values_are_uniform_and_differ_by_seed_and_table() -> None:
    values = whole()
    assert values.min() >= -1
    assert values.max() < 1
    # 6000 uniform values on [-1, 1): mean 0 +- .0075, variance 1/3 +- .004.
    assert abs(values.mean()) < 0.03
    assert abs(values.var() - 1 / 3) < 0.016
    assert values.unique().numel() > 5990
    for other in (whole(seed=1), whole(table="user")):
        assert (other == values).float().mean() < 0.001
        assert abs(torch.corrcoef(torch.stack([other.flatten(), values.flatten()]))[0, 1]) < 0.05


def test_known_value_is_splitmix64() -> None:
    # SplitMix64 of the first element, computed with Python's integers.
    import hashlib

    mask = (1 << 64) - 1
    key = int.from_bytes(hashlib.blake2b(b"7/item", digest_size=8).digest(), "little")
    z = (0x9E3779B97F4A7C15 + key) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    z ^= z >> 31
    expected = (z >> 40) / (1 << 23) - 1
    found = hashed_uniform(seed=7, table="item", rows=(0, 1), columns=(0, 1), dim=12, device=CPU)
    assert found.item() == expected


def test_fill_tables_scales_and_leaves_dense_parameters_alone() -> None:
    module = torch.nn.Sequential(
        EmbeddingBagCollection(
            tables=[EmbeddingBagConfig(name="item", embedding_dim=12, num_embeddings=500, feature_names=["f"])]
        ),
        torch.nn.Linear(2, 2),
    )
    before = module[1].weight.clone()
    fill_tables(module, seed=0, scale=0.5)
    assert torch.equal(module[0].embedding_bags["item"].weight, whole() * 0.5)
    assert torch.equal(module[1].weight, before)


def test_table_names() -> None:
    assert table_of("x.request_bags.embedding_bags.user.weight") == "user"
    assert table_of("model.body.trunk.deep.first.request.weight") is None
