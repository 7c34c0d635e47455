"""Plans for clusters that are not there: memory by hand, golden placements, the smallest cluster, why one fails."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from pipeline.config import (
    AssumedTable,
    HistoryConfig,
    ModelConfig,
    OptimizerConfig,
    ProjectionConfig,
    RunConfig,
    ShardingConfig,
    WorkloadConfig,
)
from pipeline.errors import ConfigError
from pipeline.recipes import find
from pipeline.train.assumed import assumed_schema
from pipeline.train.cluster import Cluster, DoesNotFitError, Workload
from pipeline.train.model_plan import model_plan
from pipeline.train.planner import GPUS

MILLION = 1_000_000


def workload(config: RunConfig) -> Workload:
    plan = model_plan(config, assumed_schema(config), {})
    return Workload(plan, candidates_per_request=config.sharding.workload.candidates_per_request)


def run(*tables: AssumedTable, history: int = 0, **sharding: Any) -> RunConfig:
    """A run with these tables and a tiny one, `ad`, because a model must read something of its candidates."""
    tables += (AssumedTable(name="ad", rows=10),)
    assumed = WorkloadConfig(candidates_per_request=4, history_length=history, tables=tables)
    return RunConfig(
        name="assumed",
        surfaces=("hf", "sr"),
        tasks=("click",),
        model=ModelConfig(cross_layers=0, history=HistoryConfig(kind="none"), projection=ProjectionConfig(kind="none")),
        sharding=ShardingConfig(
            **{"workload": assumed, "reserved_memory": 0.25}
            | sharding
            | {"tables": {"ad": ("table_wise",), **sharding.get("tables", {})}}
        ),
    )


def cluster(nodes: int = 1, gpus: int = 2, gpu: str = "h100") -> Cluster:
    return Cluster(gpu=GPUS[gpu], nodes=nodes, gpus_per_node=gpus)


def test_memory_by_kind_is_what_a_hand_computes() -> None:
    config = run(
        AssumedTable(name="user", rows=8 * MILLION, level="request"), tables={"user": ("row_wise",)}, pipeline=False
    )
    found = workload(config).place(cluster())
    placement = found.placements[0]
    assert (placement.sharding, placement.kernel, placement.shards, placement.gpus) == ("row_wise", "fused", 2, [0, 1])
    # Half of 8 million rows of 16 float32, and a float32 a row for row-wise Adagrad; the other table's ten rows.
    assert found.hbm["weights"] == (4 * MILLION + 10) * 16 * 4
    assert found.hbm["optimizer"] == (4 * MILLION + 10) * 4
    # 256 requests of each of two GPUs: half of their ids, 8 bytes each, come in, and all rows of 16 float32 go out. The
    # other table lies whole, with 4 candidates a request.
    assert found.hbm["exchange"] == 2 * 256 * (8 // 2 + 16 * 4) + 2 * 256 * 4 * (8 + 16 * 4)
    assert found.hbm["capacity"] == 80 * 10**9
    assert found.hbm["reserved"] == 20 * 10**9
    assert sum(found.ddr[k] for k in ("weights", "optimizer", "exchange")) == 0


@pytest.mark.parametrize(("optimizer", "per_weight"), [("sgd", 0.0), ("adagrad", 1.0), ("adam", 2.0)])
def test_each_optimizer_has_its_state(optimizer: Any, per_weight: float) -> None:
    config = replace(run(AssumedTable(name="user", rows=MILLION)), optimizer=OptimizerConfig(sparse=optimizer))
    found = workload(config).place(cluster(gpus=1))
    assert found.hbm["optimizer"] == per_weight * found.hbm["weights"]


def test_batch_level_and_mean_ids_reach_the_estimates() -> None:
    def ms(level: Any, **changes: Any) -> dict[str, float]:
        config = run(AssumedTable(name="user", rows=MILLION, level=level), tables={"user": ("table_wise",)})
        assumed = replace(config.sharding.workload, **changes)
        changed = replace(config, sharding=replace(config.sharding, workload=assumed))
        return workload(changed).place(cluster(gpus=1)).step_ms

    # One GPU holds both tables; a request has 4 candidates, so `ad` is looked up 4 times a request.
    request, candidate = ms("request"), ms("candidate")
    assert candidate["fwd_comms"] / request["fwd_comms"] == pytest.approx((4 + 4) / (1 + 4))
    assert candidate["bwd_comms"] / request["bwd_comms"] == pytest.approx((4 + 4) / (1 + 4), rel=0.05)
    assert ms("candidate", candidates_per_request=8)["fwd_comms"] == pytest.approx(2 * candidate["fwd_comms"])
    many = ms("candidate", ids_per_row={"user": 10.0})
    assert many["input_dist_comms"] / candidate["input_dist_comms"] == pytest.approx((10 + 1) / (1 + 1))
    assert many["fwd_comms"] == pytest.approx(candidate["fwd_comms"])


def test_a_plan_that_does_not_fit_says_which_tables_and_what_would_help() -> None:
    large = run(
        AssumedTable(name="user", rows=1_500 * MILLION, level="request"),
        AssumedTable(name="topic", rows=1_000, level="request"),
        tables={"user": ("table_wise",)},
    )
    work = workload(large)
    with pytest.raises(DoesNotFitError) as raised:
        work.place(cluster(gpus=4))
    message = str(raised.value)
    assert "no plan holds 3 tables of 96.0 GB in all on 1 x 4 H100 80GB SXM" in message
    assert "60.0 GB of each GPU's 80.0 GB" in message
    assert "user: 96.0 GB, allowed table_wise: larger than a GPU and must lie on one; allow row_wise" in message
    assert work.what_would_fit(cluster(gpus=4)) == [
        "allow row_wise for user (sharding.tables)",
        "allow fused_uvm_caching (sharding.kernels): tables in the hosts' memory, with a cache on the GPU",
    ]


def test_the_smallest_cluster_is_the_first_that_holds_the_tables() -> None:
    # 192 GB of weights and 12 GB of state on hosts that hold 120 GB.
    work = workload(run(AssumedTable(name="user", rows=3_000 * MILLION), tables={"user": ("row_wise",)}))
    with pytest.raises(DoesNotFitError):
        work.place(cluster(1))
    found = work.smallest(cluster(), at_most=8)
    assert found is not None
    assert found.cluster.nodes == 2
    assert work.smallest(cluster(), at_most=1) is None


def test_ten_terabytes_lie_on_64_gpus_as_they_did() -> None:
    work = workload(find("ten_terabytes")())
    assert (len(work.tables), work.bytes) == (120, 19_536 * MILLION * 512)
    found = work.place(cluster(8, 8))
    assert Counter((p.sharding, p.kernel) for p in found.placements) == {
        ("table_wise", "fused"): 60,
        ("table_wise", "fused_uvm_caching"): 36,
        ("table_row_wise", "fused_uvm_caching"): 23,
        ("row_wise", "fused"): 1,
    }
    assert found.step_ms["total"] == pytest.approx(71.805, rel=1e-3)
    assert sum(found.hbm[k] for k in ("weights", "optimizer", "exchange")) < 0.7 * 80e9
    assert sum(found.ddr[k] for k in ("weights", "optimizer")) < 0.7 * 2e12


def test_assumed_tables_must_make_a_log() -> None:
    with pytest.raises(ConfigError, match="'demo' names no tables of its own: give --data LOG"):
        assumed_schema(find("demo")())
    with pytest.raises(ConfigError, match="needs both history_length above 0 and a table of level shared"):
        assumed_schema(run(AssumedTable(name="item", rows=10, level="shared")))
    schema = assumed_schema(run(AssumedTable(name="item", rows=10, level="shared", count=2), history=5))
    assert [f.name for f in schema.features] == ["item_000", "item_001", "ad", "history_item", "history_item_001"]
