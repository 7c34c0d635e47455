"""Plans for clusters that are not there: what TorchRec's planner would do with a run's tables, and what it takes.

The numbers are TorchRec's estimates: memory by its storage estimator, times by its performance model, which knows bytes
and bandwidths of the embedding part and nothing of the dense part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from torchrec.distributed.planner.types import (
    ParameterConstraints,
    Perf,
    PlannerError,
    ShardingOption,
    Storage,
    Topology,
)

from pipeline.config import RunConfig, ShardingConfig
from pipeline.errors import ConfigError
from pipeline.train.build import build_task
from pipeline.train.constraints import CACHED, FUSED, ROW_WISE, TABLE_WISE, sharders, table_constraints, table_loads
from pipeline.train.model_plan import ModelPlan
from pipeline.train.optimizers import fuse_optimizers
from pipeline.train.planner import Gpu, gpu_topology, make_planner
from pipeline.train.storage import storage_by_kind
from pipeline.train.tables import table_of

# Weights, gradients and DDP's buckets in float32, and the optimizer's state a parameter: bytes.
DENSE_BYTES = {"weights": 4, "gradients": 8}
DENSE_STATE = {"adam": 8, "adamw": 8, "adagrad": 4, "sgd": 0}
STEP_PARTS = ("fwd_compute", "fwd_comms", "bwd_compute", "bwd_comms", "input_dist_comms", "prefetch_compute")
LARGEST = 5


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Hosts of GPUs."""

    gpu: Gpu
    nodes: int
    gpus_per_node: int

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    def __str__(self) -> str:
        return f"{self.nodes} x {self.gpus_per_node} {self.gpu.name}"


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where one table lies. Bytes are of the whole table, weights alone."""

    table: str
    module: str
    rows: int
    dim: int
    bytes: int
    sharding: str
    kernel: str
    optimizer: str
    shards: int
    gpus: list[int]


@dataclass(frozen=True, kw_only=True)
class ClusterPlan:
    """What the planner found for a cluster.

    Args:
        cluster: what was planned for.
        placements: one a table.
        hbm: bytes on the fullest GPU by kind: weights, optimizer, exchange (ids in flight, caches' bookkeeping), dense
            (parameters, gradients, optimizer), reserved (what the run leaves to activations and dense), capacity.
        ddr: bytes of the fullest host, alike.
        step_ms: estimated milliseconds of the slowest GPU's embedding part, by part, and total.
        mean_step_ms: the same, mean over GPUs.
    """

    cluster: Cluster
    placements: list[Placement]
    hbm: dict[str, int]
    ddr: dict[str, int]
    step_ms: dict[str, float]
    mean_step_ms: float

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "gpu": asdict(self.cluster.gpu),
            "nodes": self.cluster.nodes,
            "gpus_per_node": self.cluster.gpus_per_node,
            "tables": [asdict(p) for p in self.placements],
            "hbm_bytes_of_fullest_gpu": self.hbm,
            "ddr_bytes_of_fullest_host": self.ddr,
            "embedding_step_ms_of_slowest_gpu": self.step_ms,
            "embedding_step_ms_mean": self.mean_step_ms,
        }


class DoesNotFitError(ConfigError):
    """No plan holds the tables on the cluster."""


class Workload:
    """A run's model on "meta", ready to be planned for any cluster.

    Args:
        plan: the model.
        candidates_per_request: mean over the log.

    Raises:
        ConfigError: tables cannot lie as the run asks.
    """

    def __init__(self, plan: ModelPlan, *, candidates_per_request: float) -> None:
        self.plan = plan
        self.candidates_per_request = candidates_per_request
        with torch.device("meta"):
            self.module: nn.Module = build_task(plan, table_device=torch.device("meta"))
        fuse_optimizers(self.module, plan.config.optimizer)
        self.tables = {t: p for name, p in self.module.named_parameters() if (t := table_of(name)) is not None}

    @property
    def config(self) -> RunConfig:
        return self.plan.config

    @property
    def bytes(self) -> int:
        """Of all tables' weights."""
        return sum(p.numel() * p.element_size() for p in self.tables.values())

    @property
    def dense_bytes(self) -> int:
        """What the dense part holds on each GPU, without activations."""
        count = sum(p.numel() for name, p in self.module.named_parameters() if table_of(name) is None)
        return count * (sum(DENSE_BYTES.values()) + DENSE_STATE[self.config.optimizer.dense])

    def constraints(self, sharding: ShardingConfig, cluster: Cluster) -> dict[str, ParameterConstraints]:
        """The planner's constraints, with the share of the global batch that one GPU gets."""
        loads = table_loads(
            self.plan,
            requests_per_rank=self.requests_per_gpu(cluster),
            candidates_per_request=self.candidates_per_request,
        )
        return table_constraints(self.module, sharding, self.config.optimizer, device="cuda", loads=loads)

    def requests_per_gpu(self, cluster: Cluster) -> int:
        return max(-(-self.config.loader.requests_per_batch // cluster.gpus), 1)

    def place(self, cluster: Cluster, sharding: ShardingConfig | None = None) -> ClusterPlan:
        """TorchRec's plan.

        Args:
            cluster: to plan for.
            sharding: in place of the run's.

        Raises:
            DoesNotFitError: there is no plan; says what is too large and what would help.
        """
        sharding = sharding or self.config.sharding
        topology = gpu_topology(
            cluster.gpu, nodes=cluster.nodes, gpus_per_node=cluster.gpus_per_node, reserved=sharding.reserved_memory
        )
        constraints = self.constraints(sharding, cluster)
        chosen: list[ShardingOption] = []

        def keep(options: list[ShardingOption]) -> list[ShardingOption]:
            chosen.extend(options)
            return options

        planner = make_planner(
            topology,
            constraints,
            sharding,
            requests_per_rank=self.requests_per_gpu(cluster),
            on_plan=keep,
        )
        try:
            planner.plan(self.module, sharders(sharding.exchange))
        except PlannerError as error:
            raise DoesNotFitError(self._why_not(cluster, sharding)) from error
        return self._report(cluster, sharding, topology, constraints, chosen)

    def _report(
        self,
        cluster: Cluster,
        sharding: ShardingConfig,
        topology: Topology,
        constraints: dict[str, ParameterConstraints],
        chosen: list[ShardingOption],
    ) -> ClusterPlan:
        kinds = storage_by_kind(chosen, topology, constraints, sharding)
        by_gpu = [dict.fromkeys(kinds, Storage(hbm=0, ddr=0)) for _ in range(cluster.gpus)]
        perfs = [Perf(0, 0, 0, 0) for _ in range(cluster.gpus)]
        for i, option in enumerate(chosen):
            for j, shard in enumerate(option.shards):
                assert shard.rank is not None, "the planner places every shard"
                assert shard.perf is not None, "the planner estimates every shard"
                perfs[shard.rank] += shard.perf
                for kind, storages in kinds.items():
                    by_gpu[shard.rank][kind] += storages[i][j]
        fullest = max(by_gpu, key=lambda s: sum(v.hbm for v in s.values()))
        local = cluster.gpus_per_node
        hosts = [
            {kind: sum(g[kind].ddr for g in by_gpu[h * local : (h + 1) * local]) for kind in kinds}
            for h in range(cluster.nodes)
        ]
        slowest = max(perfs, key=lambda p: p.total)
        gpu = cluster.gpu
        return ClusterPlan(
            cluster=cluster,
            placements=[
                self._placement(option) for option in sorted(chosen, key=lambda o: (-o.tensor.numel(), o.name))
            ],
            hbm={kind: s.hbm for kind, s in fullest.items()}
            | {
                "dense": self.dense_bytes,
                "reserved": int(gpu.hbm * sharding.reserved_memory),
                "capacity": gpu.hbm,
            },
            ddr=max(hosts, key=lambda h: sum(h.values()))
            | {"reserved": int(gpu.host_memory * sharding.reserved_memory), "capacity": gpu.host_memory},
            step_ms={part: getattr(slowest, part) for part in STEP_PARTS} | {"total": slowest.total},
            mean_step_ms=sum(p.total for p in perfs) / len(perfs),
        )

    def _placement(self, option: ShardingOption) -> Placement:
        rows, dim = option.tensor.shape
        return Placement(
            table=option.name,
            module=option.path.removeprefix("model.embeddings."),
            rows=rows,
            dim=dim,
            bytes=option.tensor.numel() * option.tensor.element_size(),
            sharding=option.sharding_type,
            kernel=option.compute_kernel,
            optimizer=self.config.optimizer.of_table(option.name)[0],
            shards=option.num_shards,
            gpus=sorted({shard.rank for shard in option.shards if shard.rank is not None}),
        )

    def _why_not(self, cluster: Cluster, sharding: ShardingConfig) -> str:
        """What is too large; sizes in 10^9 bytes."""
        left = cluster.gpu.hbm * (1 - sharding.reserved_memory)
        largest = sorted(self.tables.items(), key=lambda item: (-item[1].numel(), item[0]))[:LARGEST]
        held = self.bytes / cluster.gpus
        lines = [
            f"no plan holds {len(self.tables)} tables of {_gb(self.bytes)} GB in all on {cluster} with "
            f"kernels {', '.join(sharding.kernels)}: {_gb(left)} GB of each GPU's {_gb(cluster.gpu.hbm)} GB may hold "
            f"tables (sharding.reserved_memory {sharding.reserved_memory:g}), {_gb(left * cluster.gpus)} GB in all; "
            f"weights alone are {_gb(held)} GB a GPU if they lay evenly, without their optimizer's state"
        ]
        for table, parameter in largest:
            size = parameter.numel() * parameter.element_size()
            types = sharding.tables.get(table, (TABLE_WISE, ROW_WISE))
            whole = set(types) == {TABLE_WISE} and size > left
            lines.append(
                f"  {table}: {_gb(size)} GB, allowed {', '.join(types)}"
                + (f": larger than a GPU and must lie on one; allow {ROW_WISE} in sharding.tables" if whole else "")
            )
        return "\n".join(lines)

    def what_would_fit(self, cluster: Cluster) -> list[str]:
        """Changes of the run, each tried with the planner, under which the cluster holds the tables."""
        sharding = self.config.sharding
        left = cluster.gpu.hbm * (1 - sharding.reserved_memory)
        rows = {
            t: (*kinds, ROW_WISE)
            for t, kinds in sharding.tables.items()
            if ROW_WISE not in kinds and self.tables[t].numel() * self.tables[t].element_size() > left
        }
        cached = replace(sharding, kernels=(FUSED, CACHED), table_kernels={})
        trials = {
            f"allow {ROW_WISE} for {', '.join(sorted(rows))} (sharding.tables)": replace(
                sharding, tables={**sharding.tables, **rows}
            )
            if rows
            else None,
            f"allow {CACHED} (sharding.kernels): tables in the hosts' memory, with a cache on the GPU": cached
            if CACHED not in sharding.kernels or sharding.table_kernels
            else None,
            "both of these": replace(cached, tables={**sharding.tables, **rows}) if rows else None,
        }
        found: list[str] = []
        for what, changed in trials.items():
            if changed is None or (found and what == "both of these"):
                continue
            try:
                self.place(cluster, changed)
            except DoesNotFitError:
                continue
            found.append(what)
        return found

    def smallest(
        self, cluster: Cluster, *, at_most: int, tell: Callable[[str], None] = lambda _: None
    ) -> ClusterPlan | None:
        """The plan for the fewest hosts of this kind that hold the tables, searched by halves; None above `at_most`.

        The search starts at the hosts whose memory is at least the weights' bytes: no plan can do with fewer.
        """
        sharding = self.config.sharding
        kernels = {k for t in self.tables for k in sharding.table_kernels.get(t, sharding.kernels)}
        gpu = cluster.gpu
        node = gpu.hbm * cluster.gpus_per_node + (gpu.host_memory if kernels != {FUSED} else 0)
        low, high = max(-(-self.bytes // int(node * (1 - sharding.reserved_memory))), 1), at_most
        best: ClusterPlan | None = None
        step = 1
        while low <= high:
            nodes = min(low + step - 1, high) if best is None else (low + high) // 2
            tell(f"trying {nodes} x {cluster.gpus_per_node}")
            try:
                best = self.place(replace(cluster, nodes=nodes))
                high = nodes - 1
            except DoesNotFitError:
                low, step = nodes + 1, step * 2
        return best


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f}"
