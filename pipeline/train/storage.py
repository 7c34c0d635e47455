"""Memory of a plan by kind: differences of TorchRec's own estimates, which tell sums alone."""

from __future__ import annotations

import torch
from torchrec.distributed.planner.types import (
    ParameterConstraints,
    Shard,
    SharderDataMap,
    ShardingOption,
    Storage,
    Topology,
)
from torchrec.distributed.planner.utils import build_sharder_data_map, sharder_name

from pipeline.config import ShardingConfig
from pipeline.train.constraints import sharders
from pipeline.train.planner import storage_estimator


def storage_by_kind(
    chosen: list[ShardingOption],
    topology: Topology,
    constraints: dict[str, ParameterConstraints],
    sharding: ShardingConfig,
) -> dict[str, list[list[Storage]]]:
    """Weights, optimizer state and exchange of each shard, as differences of TorchRec's estimates."""
    data = build_sharder_data_map({sharder_name(s.module_type): s for s in sharders(sharding.exchange)})

    def estimated(*, weights_only: bool) -> list[list[Storage]]:
        # Without a name for the optimizer the estimate counts no state of it.
        return [_estimate(_bare(o), topology, constraints, sharding, data, weights_only) for o in chosen]

    weights, stateless = estimated(weights_only=True), estimated(weights_only=False)
    full = [[shard.storage for shard in option.shards] for option in chosen]
    return {
        "weights": weights,
        "optimizer": [[a - b for a, b in zip(x, y, strict=True)] for x, y in zip(full, stateless, strict=True)],
        "exchange": [[a - b for a, b in zip(x, y, strict=True)] for x, y in zip(stateless, weights, strict=True)],
    }


def _estimate(
    option: ShardingOption,
    topology: Topology,
    constraints: dict[str, ParameterConstraints],
    sharding: ShardingConfig,
    data: SharderDataMap,
    weights_only: bool,
) -> list[Storage]:
    storage_estimator(topology, constraints, sharding, weights_only=weights_only).estimate([option], data)
    return [shard.storage for shard in option.shards if shard.storage is not None]


def _bare(option: ShardingOption) -> ShardingOption:
    """The option of a table whose optimizer nobody knows."""
    return ShardingOption(
        name=option.name,
        tensor=torch.empty(option.tensor.shape, dtype=option.tensor.dtype, device="meta"),
        module=option.module,
        input_lengths=option.input_lengths,
        batch_size=option.batch_size,
        sharding_type=option.sharding_type,
        partition_by=option.partition_by,
        compute_kernel=option.compute_kernel,
        shards=[Shard(size=list(s.size), offset=list(s.offset)) for s in option.shards],
        cache_params=option.cache_params,
        is_pooled=option.is_pooled,
    )
