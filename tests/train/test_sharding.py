"""What a run may ask of its tables, each table's own optimizer, and modules that fall out of the pipeline."""

from __future__ import annotations

import sys
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from pipeline.config import OptimizerConfig, ShardingConfig
from pipeline.errors import ConfigError
from pipeline.train.constraints import TableLoad, table_constraints
from pipeline.train.optimizers import build_optimizer
from pipeline.train.pipelining import build_pipeline, sharded_modules
from pipeline.train.sharding import APART_TIMEOUT_S, describe_plan, joined, shard
from pipeline.train.tables import fill_tables

META = torch.device("meta")


class Tables(nn.Module):
    """Pooled tables, a sequence table and a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(8, 1)
        self.bags = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(name=t, embedding_dim=8, num_embeddings=10, feature_names=[t])
                for t in ("user", "topic")
            ],
            device=META,
        )
        self.sequences = EmbeddingCollection(
            tables=[EmbeddingConfig(name="item", embedding_dim=8, num_embeddings=10, feature_names=["item"])],
            device=META,
        )


def constraints(
    sharding: ShardingConfig, optimizer: OptimizerConfig | None = None, *, device: str = "cpu", **kwargs: Any
) -> Any:
    return table_constraints(Tables(), sharding, optimizer or OptimizerConfig(), device=device, **kwargs)


@pytest.mark.parametrize(
    ("sharding", "optimizer", "device", "message"),
    [
        ({"tables": {"user": ("diagonal",)}}, {}, "cuda", "table 'user': unknown sharding type 'diagonal'"),
        ({"tables": {"item": ("table_row_wise",)}}, {}, "cuda", "sequences cannot lie table_row_wise"),
        ({"tables": {"user": ("column_wise",)}}, {}, "cuda", "splits the row that rowwise_adagrad averages over"),
        ({"tables": {"user": ("data_parallel",)}}, {"sparse": "adam"}, "cuda", "data_parallel has no fused adam"),
        ({"tables": {"item": ("data_parallel",)}}, {}, "cpu", "data_parallel sequences do not work on CPU"),
        ({"tables": {"user": ("row_wise",)}, "exchange": "bf16"}, {}, "cpu", "set sharding.exchange to fp16"),
        ({"kernels": ("fused_uvm_caching",)}, {}, "cpu", "on CPU the only kernel is fused"),
        ({"table_kernels": {"user": ("fast",)}}, {}, "cuda", "table 'user': unknown kernel 'fast'"),
        ({"prefetch": True}, {}, "cpu", "on CPU leave it off"),
        ({"min_partition": {"usr": 4}}, {}, "cuda", "min_partition: unknown table 'usr'; did you mean 'user'"),
        ({}, {"table_lrs": {"itm": 0.1}}, "cuda", "table_lrs: unknown table 'itm'; did you mean 'item'"),
        ({}, {"table_optimizers": {"item": "adam"}}, "cpu", "no fused adam on CPU, asked for item"),
    ],
)
def test_what_cannot_work_is_refused_and_the_cause_named(
    sharding: dict[str, Any], optimizer: dict[str, Any], device: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        constraints(ShardingConfig(**sharding), OptimizerConfig(**optimizer), device=device)


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        constraints(ShardingConfig(tables={"user": ("diagonal",), "nobody": ("row_wise",)}, prefetch=True))
    assert str(raised.value).count("\n  - ") == 3


def test_constraints_reach_the_planner() -> None:
    config = ShardingConfig(
        tables={"user": ("row_wise", "data_parallel")},
        kernels=("fused", "fused_uvm_caching"),
        table_kernels={"topic": ("fused",)},
        min_partition={"user": 4},
        table_cache_load_factors={"user": 0.5},
        prefetch=True,
    )
    load = TableLoad(ids_per_row=(3.0,), rows=(64,))
    found = constraints(config, device="cuda", loads={"user": load})
    user, topic, item = (found[t] for t in ("user", "topic", "item"))
    assert user.sharding_types == ["row_wise", "data_parallel"]
    assert user.compute_kernels == ["fused", "fused_uvm_caching", "dense"]
    assert (user.min_partition, user.pooling_factors, user.batch_sizes) == (4, [3.0], [64])
    assert (user.cache_params.load_factor, user.cache_params.prefetch_pipeline) == (0.5, True)
    assert item.cache_params.load_factor == 0.2
    # It has no cache, and is handed batches ahead all the same.
    assert (topic.cache_params.load_factor, topic.cache_params.prefetch_pipeline) == (None, True)
    assert constraints(replace(config, prefetch=False), device="cuda")["topic"].cache_params is None
    assert topic.sharding_types == ["table_wise", "row_wise", "table_row_wise"]
    assert constraints(ShardingConfig())["topic"].sharding_types == ["table_wise"]


def ids(*keys: str) -> KeyedJaggedTensor:
    count = 2 * len(keys)
    return KeyedJaggedTensor(keys=list(keys), values=torch.arange(count) % 10, lengths=torch.ones(count).long())


class Batch(Pipelineable):
    """What a pipeline moves."""

    def __init__(self, ids: KeyedJaggedTensor) -> None:
        self.ids = ids

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        return self

    def record_stream(self, stream: Any) -> None:
        pass

    def pin_memory(self) -> Batch:
        return self


class Untouched(nn.Module):
    """Feeds its tables the batch's ids as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = Tables().bags
        self.dense = nn.Linear(16, 1)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        pooled = self.bags(batch.ids).values()
        return self.dense(pooled).sum().unsqueeze(0), pooled


class Changed(Untouched):
    """Changes the ids on their way to the table."""

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        changed = KeyedJaggedTensor(batch.ids.keys(), batch.ids.values() + 0, lengths=batch.ids.lengths())
        pooled = self.bags(changed).values()
        return self.dense(pooled).sum().unsqueeze(0), pooled


def one_step(model: nn.Module, config: ShardingConfig) -> list[str]:
    """A step of a pipeline; names of the modules it should hold."""
    with joined() as ranks:
        optimizer = OptimizerConfig()
        sharded = shard(model, sharding=config, optimizer=optimizer, ranks=ranks, requests_per_rank=2)
        fill_tables(sharded, seed=0, scale=0.1)
        pipeline = build_pipeline(sharded, build_optimizer(sharded, optimizer, total_steps=1), config, ranks.device)
        pipeline.progress(iter([Batch(ids("user", "topic"))]))
        return list(sharded_modules(sharded))


def test_a_module_that_falls_out_of_the_pipeline_is_an_error_that_names_it_and_the_cause() -> None:
    assert one_step(Untouched(), ShardingConfig()) == ["bags"]
    with pytest.raises(ConfigError, match=r"(?s)bags fell out of the train pipeline:.*add.*NOT be pipelined"):
        one_step(Changed(), ShardingConfig())
    assert one_step(Changed(), ShardingConfig(pipeline=False)) == ["bags"]


def test_each_table_has_its_optimizer_and_rate_and_all_warm_up_alike() -> None:
    optimizer = OptimizerConfig(
        sparse_lr=0.1, table_optimizers={"topic": "sgd"}, table_lrs={"topic": 0.5}, warmup_steps=4, decay="none"
    )
    with joined() as ranks:
        sharded = shard(Tables(), sharding=ShardingConfig(), optimizer=optimizer, ranks=ranks, requests_per_rank=2)
        fill_tables(sharded, seed=0, scale=0.1)
        before = {n: v.local_shards()[0].tensor.clone() for n, v in sharded.state_dict().items() if "bags" in n}
        combined = build_optimizer(sharded, optimizer, total_steps=10)
        assert [name for name, _ in combined.optimizers] == ["tables", "tables_at_0.5", "dense"]
        # The rate starts at zero and rises to its full height over four steps.
        rates = []
        for _ in range(6):
            combined.zero_grad()  # which also hands the rate to the fused kernels, as pipelines do before each step
            sharded.module.bags(ids("user", "topic")).values().sum().backward()
            combined.step()
            rates.append([part.param_groups[0]["lr"] for _, part in combined.optimizers[:2]])
        assert rates == [pytest.approx([0.1 * m, 0.5 * m]) for m in (0.25, 0.5, 0.75, 1.0, 1.0, 1.0)]
        after = {n: v.local_shards()[0].tensor for n, v in sharded.state_dict().items() if "bags" in n}
        rows = {row["table"]: row for row in describe_plan(sharded.plan, optimizer)}
    # Plain gradient descent: looked up once a step with gradient 1, at rates 0, .25, .5, .75, 1, 1 of 0.5.
    topic = "bags.embedding_bags.topic.weight"
    torch.testing.assert_close(before[topic][2] - after[topic][2], torch.full((8,), 0.5 * 3.5))
    # Row-wise Adagrad: the k-th equal gradient of 1 moves by rate / sqrt(k).
    user = "bags.embedding_bags.user.weight"
    moved = sum(0.1 * m / k**0.5 for k, m in enumerate((0, 0.25, 0.5, 0.75, 1, 1), start=1))
    torch.testing.assert_close(before[user][0] - after[user][0], torch.full((8,), moved))
    assert (rows["topic"]["optimizer"], rows["topic"]["lr"]) == ("sgd", 0.5)
    assert (rows["user"]["optimizer"], rows["user"]["lr"], rows["user"]["dtype"]) == ("rowwise_adagrad", 0.1, "float32")


def test_one_run_after_another_leaves_the_hook_for_errors_as_it_was() -> None:
    before = sys.excepthook
    for _ in range(2):
        with joined():
            assert sys.excepthook is not before
        assert sys.excepthook is before


def test_tables_that_no_rank_can_hold_are_one_clear_error() -> None:
    sharding = ShardingConfig(reserved_memory=1 - 1e-9)
    message = r"(?s)the tables do not fit on 1 rank\(s\).*trefoil plan"
    with joined() as ranks, pytest.raises(ConfigError, match=message):
        shard(Tables(), sharding=sharding, optimizer=OptimizerConfig(), ranks=ranks, requests_per_rank=2)


def test_more_local_ranks_than_gpus_are_refused_before_anything_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="local rank 2 has no GPU: this host has 2"), joined():
        pass


def test_a_group_apart_is_joined_in_the_time_of_a_step_and_waits_longer_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A rank that stops while groups are made must not hold up the others for an hour."""
    joining: list[timedelta] = []
    real = dist.new_group

    def new_group(**options: Any) -> Any:
        joining.append(options["timeout"])
        return real(**options)

    monkeypatch.setattr(dist, "new_group", new_group)
    with joined(timeout_s=7) as ranks:
        apart = ranks.apart().host_group
        assert joining == [timedelta(seconds=7)]
        found = [group._get_backend(torch.device("cpu")).options._timeout for group in (ranks.host_group, apart)]
        assert found == [timedelta(seconds=7), timedelta(seconds=APART_TIMEOUT_S)]
