"""The one place that distributes: process group, plan, sharded model, optimizers, train pipeline.

Models are written for one device. Here a module becomes a DistributedModelParallel on whatever is there:
CUDA with NCCL, or CPU with gloo, from the same lines.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import ShardingType
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import KernelConfig, ParameterConstraints, TopologyFactory, TrainerConfig
from torchrec.distributed.types import ModuleSharder, ShardingEnv, ShardingPlan
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import SGD, Adagrad, Adam, in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.optim.warmup import WarmupOptimizer, WarmupPolicy, WarmupStage

from pipeline.config import OptimizerConfig, ShardingConfig
from pipeline.errors import ConfigError, unknown
from pipeline.train.quiet import quiet_dependencies
from pipeline.train.tables import table_of

Value = TypeVar("Value")

# How long a thread beside training waits for its peers: as long as the slowest may take to write its shards.
APART_TIMEOUT_S = 3600
SPARSE_OPTIMIZERS = {"rowwise_adagrad": RowWiseAdagrad, "adagrad": Adagrad, "adam": Adam, "sgd": SGD}
# Share of a device's memory that the planner leaves to dense parameters, activations and buffers.
RESERVED_MEMORY = 0.3
SHARDING_TYPES = tuple(t.value for t in ShardingType)
TABLE_WISE, ROW_WISE = ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value
DENSE_OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among its peers.

    Args:
        rank: of this process.
        world_size: number of processes.
        device: where this process computes.
        host_group: a gloo group for small exchanges between hosts' memories; the main group on CPU.
    """

    rank: int
    world_size: int
    device: torch.device
    host_group: dist.ProcessGroup

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of a host tensor over all ranks."""
        total = values.clone()
        dist.all_reduce(total, group=self.host_group)
        return total

    def barrier(self) -> None:
        dist.barrier(group=self.host_group)

    def gather(self, value: Value) -> list[Value]:
        """Every rank's value, in order of rank, on every rank; for small Python objects."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def apart(self) -> Ranks:
        """The same ranks with a host group of their own, for a thread beside training; every rank calls this."""
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=APART_TIMEOUT_S))
        return replace(self, host_group=cast(dist.ProcessGroup, group))


@contextmanager
def joined(*, timeout_s: float = 1800) -> Iterator[Ranks]:
    """Join the process group that the launcher (torchrun, TorchX) describes in the environment, or be alone.

    Args:
        timeout_s: a collective that takes longer is an error on the ranks that wait in it.

    Raises:
        ConfigError: the launcher started more local ranks than there are GPUs.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"local rank {local_rank} has no GPU: this host has {torch.cuda.device_count()}; start fewer ranks"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    # TorchRec reads it too, and a single process has no launcher that would set it.
    os.environ.setdefault("LOCAL_WORLD_SIZE", str(world_size))
    quiet_dependencies()
    timeout = timedelta(seconds=timeout_s)
    if world_size > 1:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    world = cast(dist.ProcessGroup, dist.group.WORLD)
    host_group = (
        world if backend == "gloo" else cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout))
    )
    try:
        yield Ranks(rank=rank, world_size=world_size, device=device, host_group=host_group)
    finally:
        dist.destroy_process_group()


def sharders() -> list[ModuleSharder[nn.Module]]:
    """The sharders of the collections that models are made of."""
    return [
        cast(ModuleSharder[nn.Module], EmbeddingBagCollectionSharder()),
        cast(ModuleSharder[nn.Module], EmbeddingCollectionSharder()),
    ]


def table_constraints(
    config: ShardingConfig, module: nn.Module, device: torch.device
) -> dict[str, ParameterConstraints]:
    """The planner's constraints for the tables of a module.

    Tables that the run does not name may lie table- or row-wise: with these the fused optimizer does exactly what
    it does unsharded. Column-wise splits the row that RowWiseAdagrad averages over; data-parallel has no fused
    kernel. Row-wise bags give each rank its own number of rows back, which gloo's all_gather cannot take, so on CPU
    bags lie table-wise.

    Raises:
        ConfigError: a sharding type that TorchRec does not have, or that cannot work on the device.
    """
    constraints = {}
    for name, _ in module.named_parameters():
        table = table_of(name)
        if table is None:
            continue
        is_bag = ".embedding_bags." in name
        chosen = config.tables.get(table, (TABLE_WISE,) if is_bag and device.type == "cpu" else (TABLE_WISE, ROW_WISE))
        for kind in chosen:
            if kind not in SHARDING_TYPES:
                raise ConfigError(
                    f"sharding.tables: table {table!r}: " + unknown("sharding type", kind, SHARDING_TYPES)
                )
            if kind == ROW_WISE and is_bag and device.type == "cpu":
                raise ConfigError(
                    f"sharding.tables: table {table!r} is pooled in bags, which cannot lie row_wise over gloo: its "
                    "all_gather wants the same number of rows from each rank. Use table_wise or column_wise"
                )
        constraints[table] = ParameterConstraints(sharding_types=list(chosen))
    return constraints


def plan_shards(module: nn.Module, config: ShardingConfig, ranks: Ranks, requests_per_rank: int) -> ShardingPlan:
    """TorchRec's plan for the ranks at hand, the same on each."""
    topology = TopologyFactory.create_topology(
        TrainerConfig(
            world_size=ranks.world_size,
            local_world_size=int(os.environ["LOCAL_WORLD_SIZE"]),
        ),
        kernel_config=KernelConfig(compute_device=ranks.device.type),
    )
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=requests_per_rank,
        storage_reservation=FixedPercentageStorageReservation(percentage=RESERVED_MEMORY),
        constraints=table_constraints(config, module, ranks.device),
    )
    return planner.collective_plan(module, sharders(), cast(dist.ProcessGroup, dist.group.WORLD))


def shard(
    module: nn.Module, *, sharding: ShardingConfig, optimizer: OptimizerConfig, ranks: Ranks, requests_per_rank: int
) -> DistributedModelParallel:
    """Distribute a module whose tables lie on "meta"; tables get their optimizer in the backward pass.

    Table weights are whatever memory held: fill them (`pipeline.train.tables`) or load them.
    """
    tables = [p for name, p in module.named_parameters() if table_of(name) is not None]
    kwargs: dict[str, Any] = {"lr": optimizer.sparse_lr}
    if optimizer.sparse != "sgd":
        kwargs["eps"] = 1e-8
    _apply_optimizer_in_backward(SPARSE_OPTIMIZERS[optimizer.sparse], tables, kwargs)
    plan = plan_shards(module, sharding, ranks, requests_per_rank)
    world = cast(dist.ProcessGroup, dist.group.WORLD)
    return DistributedModelParallel(
        module=module,
        env=ShardingEnv.from_process_group(world),
        device=ranks.device,
        plan=plan,
        sharders=sharders(),
    )


def build_optimizer(model: DistributedModelParallel, config: OptimizerConfig, *, total_steps: int) -> CombinedOptimizer:
    """One optimizer over fused tables and dense parameters, with the same warm-up and decay for both.

    Args:
        model: the sharded model.
        config: what to use.
        total_steps: steps of the whole run, at whose end a linear decay reaches zero.
    """
    dense_kwargs: dict[str, Any] = {"lr": config.dense_lr}
    if config.dense_weight_decay:
        dense_kwargs["weight_decay"] = config.dense_weight_decay
    # One kernel for all parameters: many small tensors cost Python's time, not arithmetic's.
    dense_kwargs["fused"] = True
    dense: KeyedOptimizer = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(model.named_parameters())),
        lambda params: DENSE_OPTIMIZERS[config.dense](params, **dense_kwargs),
    )
    if config.clip_gradient_norm is not None:
        dense = GradientClippingOptimizer(dense, clipping=GradientClipping.NORM, max_gradient=config.clip_gradient_norm)
    return CombinedOptimizer(
        [
            ("tables", WarmupOptimizer(model.fused_optimizer, _stages(config, total_steps), lr=config.sparse_lr)),
            ("dense", WarmupOptimizer(dense, _stages(config, total_steps), lr=config.dense_lr)),
        ]
    )


def _stages(config: OptimizerConfig, total_steps: int) -> list[WarmupStage]:
    stages = []
    warmup = min(config.warmup_steps, total_steps)
    if warmup:
        stages.append(WarmupStage(policy=WarmupPolicy.LINEAR, max_iters=warmup, value=0.0))
    if config.decay == "linear" and total_steps > warmup:
        stages.append(
            WarmupStage(
                policy=WarmupPolicy.INTERPOLATE,
                max_iters=total_steps,
                value=1.0,
                start_interpolating_iters=warmup,
                end_value=0.0,
            )
        )
    return stages


def describe_plan(plan: ShardingPlan) -> list[dict[str, object]]:
    """One row for each table: where it lies and how."""
    rows = []
    for module, parameters in plan.plan.items():
        for table, sharding in cast(dict[str, Any], parameters).items():
            shards = sharding.sharding_spec.shards if sharding.sharding_spec is not None else []
            rows.append(
                {
                    "module": module.removeprefix("model.embeddings."),
                    "table": table,
                    "sharding": sharding.sharding_type,
                    "kernel": sharding.compute_kernel,
                    "ranks": list(sharding.ranks or []),
                    "rows": sum(s.shard_sizes[0] for s in shards if s.shard_offsets[1] == 0) or None,
                    "dim": sum(s.shard_sizes[1] for s in shards if s.shard_offsets[0] == 0) or None,
                }
            )
    return rows
