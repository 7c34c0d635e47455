"""Tables spread over ranks train like whole ones: every sharding type, every optimizer, ten steps, uneven ranks.

The reference is one process with TorchRec's unsharded collections and torch's own optimizers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from pipeline.config import OptimizerConfig, ShardingConfig
from pipeline.train.optimizers import build_optimizer
from pipeline.train.sharding import Ranks, joined, shard
from pipeline.train.tables import fill_tables, table_of
from tests.distributed.ranks import run_ranks

RANKS, STEPS, DIM = 2, 10, 8
ROWS = {"user": 11, "topic": 20, "item": 17}
# FBGEMM has no fused Adam on CPU.
LR = {"rowwise_adagrad": 0.1, "adagrad": 0.1, "sgd": 0.1}

BAG_TYPES = (
    "table_wise",
    "row_wise",
    "table_row_wise",
    "column_wise",
    "table_column_wise",
    "grid_shard",
    "data_parallel",
)
SEQUENCE_TYPES = ("table_wise", "row_wise", "column_wise")


def allowed(kind: str, optimizer: str) -> bool:
    """Whether a table so split and so trained equals a whole one; the others are refused."""
    return optimizer != "rowwise_adagrad" or kind not in ("column_wise", "table_column_wise", "grid_shard")


CASES = [
    (kind, kind if kind in SEQUENCE_TYPES else "table_wise", optimizer, "fp32")
    for optimizer in LR
    for kind in BAG_TYPES
    if allowed(kind, optimizer)
]

ROUNDED = [("table_wise", "row_wise", "sgd", exchange) for exchange in ("fp16", "bf16")]
Case = tuple[str, str, str, str]


class Model(nn.Module):
    """Two bags and a sequence, then one dense layer."""

    def __init__(self, device: str) -> None:
        super().__init__()
        # First, because tables that are made draw random numbers and those on "meta" do not.
        self.dense = nn.Linear(2 * DIM, 1)
        where = torch.device(device)
        self.bags = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(name=t, embedding_dim=DIM, num_embeddings=ROWS[t], feature_names=[t])
                for t in ("user", "topic")
            ],
            device=where,
        )
        self.sequences = EmbeddingCollection(
            tables=[
                EmbeddingConfig(name="item", embedding_dim=DIM, num_embeddings=ROWS["item"], feature_names=["item"])
            ],
            device=where,
        )

    def forward(self, bags: KeyedJaggedTensor, items: KeyedJaggedTensor) -> tuple[Tensor, Tensor]:
        pooled, events = self.bags(bags), self.sequences(items)
        return self.dense(torch.cat([pooled["user"], pooled["topic"]], dim=1)), events["item"].values()


def make(device: str) -> Model:
    torch.manual_seed(3)
    return Model(device)


def batches(rank: int) -> Iterator[tuple[KeyedJaggedTensor, KeyedJaggedTensor]]:
    """Ten batches of a rank; ranks have unequal numbers of rows, and rows any number of ids, none too."""
    generator = torch.Generator().manual_seed(100 + rank)

    def draw(tables: tuple[str, ...], rows: int) -> KeyedJaggedTensor:
        lengths = torch.randint(0, 4, (len(tables) * rows,), generator=generator)
        sizes = lengths.view(len(tables), rows).sum(1).tolist()
        values = [torch.randint(0, ROWS[t], (int(n),), generator=generator) for t, n in zip(tables, sizes, strict=True)]
        return KeyedJaggedTensor(keys=list(tables), values=torch.cat(values), lengths=lengths)

    for step in range(STEPS):
        yield draw(("user", "topic"), 3 + 2 * rank + step % 2), draw(("item",), 4 + rank)


def loss_of(outputs: tuple[Tensor, Tensor]) -> Tensor:
    logits, events = outputs
    return (logits - 1).square().sum() + (events - 0.3).square().sum()


def reference(optimizer: str) -> dict[str, np.ndarray]:
    """First outputs of each rank's rows, then parameters and optimizer state after all steps, of whole tables."""
    model = make("cpu")
    fill_tables(model, seed=1, scale=0.5)
    tables = {n: p for n, p in model.named_parameters() if table_of(n)}
    kinds: dict[str, Any] = {
        "rowwise_adagrad": RowWiseAdagrad,
        "adagrad": torch.optim.Adagrad,
        "sgd": torch.optim.SGD,
    }
    arguments = {"lr": LR[optimizer]} | ({} if optimizer == "sgd" else {"eps": 1e-8})
    sparse = kinds[optimizer](list(tables.values()), **arguments)
    dense = torch.optim.Adam(model.dense.parameters(), lr=0.01)
    found: dict[str, np.ndarray] = {}
    for step, given in enumerate(zip(*(batches(r) for r in range(RANKS)), strict=True)):
        outputs = [model(*batch) for batch in given]
        if step == 0:
            found |= {f"output {r} {i}": v.detach().numpy() for r, out in enumerate(outputs) for i, v in enumerate(out)}
        model.zero_grad()
        (sum((loss_of(out) for out in outputs), torch.zeros(())) / RANKS).backward()
        sparse.step()
        dense.step()
    found |= {f"parameter {n}": p.detach().numpy() for n, p in model.named_parameters()}
    for name, parameter in tables.items():
        state = sparse.state[parameter]
        if optimizer == "rowwise_adagrad":
            found[f"state {name} momentum1"] = state["sum"][:, 0].numpy()
        elif optimizer == "adagrad":
            found[f"state {name} momentum1"] = state["sum"].numpy()
    return found


def pieces(value: Any) -> list[tuple[list[int], np.ndarray]]:
    """This rank's parts of a tensor, with their offsets in the whole."""
    if hasattr(value, "local_shards"):
        return [(s.metadata.shard_offsets, s.tensor.detach().numpy()) for s in value.local_shards()]
    return [([0] * value.ndim, value.detach().numpy())]


def together(ranks: list[dict[str, Any]], expected: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Whole tensors from all ranks' parts; NaN where no rank has one."""
    found: dict[str, np.ndarray] = {}
    for parts in ranks:
        for name in parts.keys() & expected.keys():
            out = found.setdefault(name, np.full(expected[name].shape, np.nan, dtype=np.float32))
            for offsets, part in parts[name]:
                out[tuple(slice(o, o + n) for o, n in zip(offsets, part.shape, strict=True))] = part
    return found


def sharded(ranks: Ranks, bags: str, sequences: str, optimizer: str, exchange: str) -> dict[str, Any]:
    """The same of tables that lie as asked."""
    settings = OptimizerConfig(dense="adam", dense_lr=0.01, sparse=optimizer, sparse_lr=LR[optimizer], decay="none")  # type: ignore[arg-type]
    types = {"user": (bags,), "topic": (bags,), "item": (sequences,)}
    model = shard(
        make("meta"),
        sharding=ShardingConfig(tables=types, min_partition=dict.fromkeys(ROWS, 4), exchange=exchange),  # type: ignore[arg-type]
        optimizer=settings,
        ranks=ranks,
        requests_per_rank=4,
    )
    placed = {t: p.sharding_type for tables in model.plan.plan.values() for t, p in tables.items()}
    assert placed == {t: kind for t, (kind,) in types.items()}
    fill_tables(model, seed=1, scale=0.5)
    combined = build_optimizer(model, settings, total_steps=STEPS)
    found: dict[str, Any] = {}
    for step, batch in enumerate(batches(ranks.rank)):
        outputs = model(*batch)
        if step == 0:
            found |= {f"output {ranks.rank} {i}": pieces(v) for i, v in enumerate(outputs)}
        combined.zero_grad()
        loss_of(outputs).backward()
        combined.step()
    found |= {f"parameter {name}": pieces(value) for name, value in model.state_dict().items()}
    for name, state in model.fused_optimizer.state_dict()["state"].items():
        for key, value in state.items():
            part = key.rsplit(".", 1)[-1]
            if getattr(value, "ndim", None) or hasattr(value, "local_shards"):
                found[f"state {name} {part}"] = pieces(value)
    return found


def all_sharded(cases: list[Case]) -> list[dict[str, Any]]:
    with joined() as ranks:
        return [sharded(ranks, *case) for case in cases]


def test_sharded_tables_train_like_whole_ones_and_half_precision_stays_within_its_tolerance() -> None:
    """One test, because starting ranks is what costs."""
    cases = CASES + ROUNDED
    ranks = run_ranks(all_sharded, RANKS, cases)
    expected = {optimizer: reference(optimizer) for optimizer in LR}
    for i, case in enumerate(cases):
        found = together([rank[i] for rank in ranks], expected[case[2]])
        if case in ROUNDED:
            check_rounded(found, expected[case[2]], rounding={"fp16": 2**-11, "bf16": 2**-8}[case[3]])
        else:
            check_equal(found, expected[case[2]], case)


def check_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], case: Case) -> None:
    # A data-parallel table's state is a dense optimizer's; what it does to the parameters is what is compared.
    replicated = {n for n in expected if n.startswith("state ") and case[0] == "data_parallel"}
    assert found.keys() | replicated == expected.keys(), case
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-5, err_msg=f"{case} {name}")


def check_rounded(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], *, rounding: float) -> None:
    # Each event's embedding, below 0.5, is rounded once on its way.
    error = np.abs(found["output 0 1"] - expected["output 0 1"]).max()
    assert 0 < error <= 0.5 * rounding
    for name in found:
        if name.startswith("parameter "):
            np.testing.assert_allclose(found[name], expected[name], atol=2 * STEPS * rounding, err_msg=name)
