"""The one place that distributes: process group, plan, sharded model.

Models are written for one device. Here a module becomes a DistributedModelParallel on whatever is there:
CUDA with NCCL, or CPU with gloo, from the same lines.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.comm_ops import set_use_sync_collectives
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.sharding.grid_sharding import GridPooledEmbeddingDist
from torchrec.distributed.sharding.rw_sharding import RwPooledEmbeddingDist
from torchrec.distributed.sharding.twrw_sharding import TwRwPooledEmbeddingDist
from torchrec.distributed.types import ShardingEnv, ShardingPlan

from pipeline.config import OptimizerConfig, ShardingConfig
from pipeline.errors import ConfigError
from pipeline.train.constraints import TableLoad, sharders, table_constraints
from pipeline.train.optimizers import fuse_optimizers
from pipeline.train.planner import make_planner, present_topology
from pipeline.train.quiet import quiet_dependencies

Value = TypeVar("Value")

# How long a thread beside training waits for its peers: as long as the slowest may take to write its shards.
APART_TIMEOUT_S = 3600


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
        # A peer that stopped must be noticed here as soon as in a step; only later may one take its time.
        patience: timedelta = self.host_group._get_backend(torch.device("cpu")).options._timeout
        group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=patience))
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=APART_TIMEOUT_S), group)
        return replace(self, host_group=group)


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
    # Each joining wraps the hook that prints an error's lines in one more "[rank0]:".
    excepthook = sys.excepthook
    timeout = timedelta(seconds=timeout_s)
    if world_size > 1:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
    world = cast(dist.ProcessGroup, dist.group.WORLD)
    host_group = (
        world if backend == "gloo" else cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout))
    )
    try:
        yield Ranks(rank=rank, world_size=world_size, device=device, host_group=host_group)
    finally:
        dist.destroy_process_group()
    # Not after an error, whose rank the hook shall still name.
    sys.excepthook = excepthook


def plan_shards(
    module: nn.Module,
    config: ShardingConfig,
    optimizer: OptimizerConfig,
    ranks: Ranks,
    *,
    requests_per_rank: int,
    loads: Mapping[str, TableLoad] | None = None,
) -> ShardingPlan:
    """TorchRec's plan for the ranks at hand, the same on each.

    Raises:
        ConfigError: tables cannot lie as the run asks, or do not fit.
    """
    planner = make_planner(
        present_topology(world_size=ranks.world_size, device=ranks.device, reserved=config.reserved_memory),
        table_constraints(module, config, optimizer, device=ranks.device.type, loads=loads),
        config,
        requests_per_rank=requests_per_rank,
    )
    try:
        return planner.collective_plan(module, sharders(config.exchange), cast(dist.ProcessGroup, dist.group.WORLD))
    except PlannerError as error:
        raise ConfigError(
            f"the tables do not fit on {ranks.world_size} rank(s): {str(error).strip().splitlines()[0]}\n"
            "`trefoil plan` says which tables are too large and what would hold them"
        ) from error


def shard(
    module: nn.Module,
    *,
    sharding: ShardingConfig,
    optimizer: OptimizerConfig,
    ranks: Ranks,
    requests_per_rank: int,
    loads: Mapping[str, TableLoad] | None = None,
) -> DistributedModelParallel:
    """Distribute a module whose tables lie on "meta"; tables get their optimizer in the backward pass.

    Table weights are whatever memory held: fill them (`pipeline.train.tables`) or load them. Dense parameters are
    replicated (DistributedDataParallel).

    Raises:
        ConfigError: tables cannot lie as the run asks, or do not fit.
    """
    fuse_optimizers(module, optimizer)
    plan = plan_shards(module, sharding, optimizer, ranks, requests_per_rank=requests_per_rank, loads=loads)
    world = cast(dist.ProcessGroup, dist.group.WORLD)
    model = DistributedModelParallel(
        module=module,
        env=ShardingEnv.from_process_group(world),
        device=ranks.device,
        plan=plan,
        sharders=sharders(sharding.exchange),
    )
    if ranks.device.type == "cpu":
        _sum_unequal_rows(model)
    return model


def _sum_unequal_rows(model: nn.Module) -> None:
    """Let pooled tables whose rows are split over ranks work over gloo.

    Each rank has its own number of candidates. The backward pass of TorchRec's reduce-scatter gathers them, and gloo
    gathers equal sizes only; TorchRec's synchronous form exchanges them by all-to-all, which gloo has. The switch is
    global, and a sequence table breaks under it (on a rank that holds none), so it is on in these exchanges alone.
    """
    summing = (RwPooledEmbeddingDist, TwRwPooledEmbeddingDist, GridPooledEmbeddingDist)
    for module in model.modules():
        if isinstance(module, ShardedEmbeddingBagCollection):
            for output in module._output_dists:
                if isinstance(output, summing):
                    output.register_forward_pre_hook(lambda *_: set_use_sync_collectives(True))
                    output.register_forward_hook(lambda *_: set_use_sync_collectives(False), always_call=True)


def describe_plan(plan: ShardingPlan, optimizer: OptimizerConfig) -> list[dict[str, object]]:
    """One row for each table: where it lies, how, and how it learns."""
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
                    "dtype": "float32",
                    "optimizer": optimizer.of_table(table)[0],
                    "lr": optimizer.of_table(table)[1],
                    "ranks": list(sharding.ranks or []),
                    "rows": sum(s.shard_sizes[0] for s in shards if s.shard_offsets[1] == 0) or None,
                    "dim": sum(s.shard_sizes[1] for s in shards if s.shard_offsets[0] == 0) or None,
                }
            )
    return rows
