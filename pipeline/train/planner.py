"""TorchRec's planner, set up: memory and bandwidths, estimators, search.

What is ours is thin: options in an order that does not depend on Python's hash seed, so that a restart gets the same
plan, and each estimate computed once for all tables of one shape.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.proposers import GreedyProposer, GridSearchProposer, UniformProposer
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator, EmbeddingStorageEstimator
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    HardwareConfig,
    KernelConfig,
    ParameterConstraints,
    SharderDataMap,
    ShardEstimator,
    ShardingOption,
    Topology,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import ModuleSharder, PipelineType

from pipeline.config import ShardingConfig

GB = 10**9
TB = 10**12
# A proposer stops after this many proposals in a row that are slower than its best.
PATIENCE = 20
# Choices of all tables together up to which every one is tried; a few tables reach it, and thousands take minutes.
GRID = 256


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU in the eight-GPU host that its maker sells it in. Bytes, and bytes/s in one direction.

    Args:
        name: of the GPU.
        hbm: its memory.
        hbm_bandwidth: of that memory.
        host_link: to the host's memory, PCIe x16.
        node_link: to another GPU of the host, NVLink through NVSwitch.
        network: to another host, for each GPU.
        host_memory: of the whole host.
        host_bandwidth: of the host's memory, for each of its GPUs.
    """

    name: str
    hbm: int
    hbm_bandwidth: float
    host_link: float
    node_link: float
    network: float
    host_memory: int
    host_bandwidth: float


# Sources in docs/operations.md.
GPUS = {
    "a100": Gpu(
        name="A100 80GB SXM",
        hbm=80 * GB,
        hbm_bandwidth=2039 * GB,
        host_link=32 * GB,
        node_link=300 * GB,
        network=25 * GB,
        host_memory=2 * TB,
        host_bandwidth=51.2 * GB,
    ),
    "h100": Gpu(
        name="H100 80GB SXM",
        hbm=80 * GB,
        hbm_bandwidth=3350 * GB,
        host_link=64 * GB,
        node_link=450 * GB,
        network=50 * GB,
        host_memory=2 * TB,
        host_bandwidth=76.8 * GB,
    ),
    "h200": Gpu(
        name="H200 141GB SXM",
        hbm=141 * GB,
        hbm_bandwidth=4800 * GB,
        host_link=64 * GB,
        node_link=450 * GB,
        network=50 * GB,
        host_memory=2 * TB,
        host_bandwidth=76.8 * GB,
    ),
}


def gpu_topology(gpu: Gpu, *, nodes: int, gpus_per_node: int, reserved: float) -> Topology:
    """A cluster of such GPUs, which need not be there.

    Args:
        gpu: of every rank.
        nodes: hosts.
        gpus_per_node: ranks of a host; they share its memory.
        reserved: share of a host's memory to leave alone; a GPU's own is left to the planner's reservation.
    """
    return TopologyFactory.create_topology(
        TrainerConfig(world_size=nodes * gpus_per_node, local_world_size=gpus_per_node),
        HardwareConfig(
            hbm_cap_bytes=gpu.hbm,
            ddr_cap_bytes=int(gpu.host_memory * (1 - reserved) / gpus_per_node),
            ssd_cap_bytes=0,
            # TorchRec counts bytes a millisecond.
            hbm_mem_bw=gpu.hbm_bandwidth / 1000,
            ddr_mem_bw=gpu.host_bandwidth / 1000,
            hbm_to_ddr_mem_bw=gpu.host_link / 1000,
            intra_host_bw=gpu.node_link / 1000,
            inter_host_bw=gpu.network / 1000,
        ),
        KernelConfig(compute_device="cuda"),
    )


def present_topology(*, world_size: int, device: torch.device, reserved: float) -> Topology:
    """The ranks at hand: memory as found, bandwidths of a GPU that we know by name, TorchRec's own otherwise."""
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    nodes = max(world_size // local, 1)
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        known = next((g for key, g in GPUS.items() if key in found.name.lower()), None)
        if known is not None:
            gpu = replace(known, hbm=found.total_memory, host_memory=host)
            return gpu_topology(gpu, nodes=nodes, gpus_per_node=local, reserved=reserved)
    return TopologyFactory.create_topology(
        TrainerConfig(world_size=world_size, local_world_size=local),
        HardwareConfig(
            hbm_cap_bytes=torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0,
            ddr_cap_bytes=int(host * (1 - reserved) / local),
            ssd_cap_bytes=0,
        ),
        KernelConfig(compute_device=device.type),
    )


class OrderedEnumerator(EmbeddingEnumerator):
    """TorchRec's, whose options come out of sets of strings: here in an order that every process agrees on."""

    def enumerate(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> list[ShardingOption]:
        options = super().enumerate(module, sharders)
        return sorted(options, key=lambda o: (o.fqn, o.sharding_type, o.compute_kernel))


class OncePerShape(ShardEstimator):
    """Runs estimators on one option of each kind and copies what they found to the others.

    Most of the time of a large plan is estimates, shard by shard, of tables that are alike.

    Args:
        topology: of the estimators.
        constraints: of the estimators.
        estimators: TorchRec's.
    """

    def __init__(
        self,
        topology: Topology,
        constraints: Mapping[str, ParameterConstraints],
        estimators: list[ShardEstimator],
    ) -> None:
        self._constraints = constraints
        self._estimators = estimators

    def estimate(self, sharding_options: list[ShardingOption], sharder_data_map: SharderDataMap) -> None:
        alike: dict[object, list[ShardingOption]] = {}
        for option in sharding_options:
            alike.setdefault(self._kind(option), []).append(option)
        for first, *others in alike.values():
            for estimator in self._estimators:
                estimator.estimate([first], sharder_data_map=sharder_data_map)
            for other in others:
                other.is_weighted = first.is_weighted
                for shard, known in zip(other.shards, first.shards, strict=True):
                    shard.perf, shard.storage = known.perf, known.storage

    def _kind(self, option: ShardingOption) -> object:
        """Everything that an estimate depends on, except the table's name."""
        constraint = self._constraints[option.name]
        return (
            option.module_type_key,
            option.sharding_type,
            option.compute_kernel,
            tuple(option.tensor.shape),
            option.tensor.dtype,
            tuple(getattr(option.tensor, "_optimizer_classes", ())),
            tuple(tuple(shard.size) for shard in option.shards),
            hash(constraint),
        )


def storage_estimator(
    topology: Topology,
    constraints: dict[str, ParameterConstraints],
    config: ShardingConfig,
    *,
    weights_only: bool = False,
) -> EmbeddingStorageEstimator:
    """TorchRec's estimate of memory, with the batches that the run's pipeline holds."""
    kind = PipelineType.TRAIN_PREFETCH_SPARSE_DIST if config.prefetch else PipelineType.TRAIN_SPARSE_DIST
    return EmbeddingStorageEstimator(
        topology=topology,
        constraints=constraints,
        pipeline_type=kind if config.pipeline else PipelineType.NONE,
        is_inference=weights_only,
    )


def make_planner(
    topology: Topology,
    constraints: dict[str, ParameterConstraints],
    config: ShardingConfig,
    *,
    requests_per_rank: int,
    on_plan: Callable[[list[ShardingOption]], list[ShardingOption]] | None = None,
) -> EmbeddingShardingPlanner:
    """TorchRec's planner for a topology.

    Args:
        topology: what to plan for.
        constraints: of every table.
        config: of the run.
        requests_per_rank: batch size where a constraint names none.
        on_plan: is given the chosen options, and returns them.
    """
    estimator = OncePerShape(
        topology,
        constraints,
        [EmbeddingPerfEstimator(topology, constraints), storage_estimator(topology, constraints, config)],
    )
    return EmbeddingShardingPlanner(
        topology=topology,
        batch_size=requests_per_rank,
        enumerator=OrderedEnumerator(topology, requests_per_rank, constraints, estimator),
        storage_reservation=FixedPercentageStorageReservation(percentage=config.reserved_memory),
        proposer=[
            GridSearchProposer(max_proposals=GRID),
            GreedyProposer(threshold=PATIENCE),
            GreedyProposer(use_depth=False, threshold=PATIENCE),
            UniformProposer(),
        ],
        constraints=constraints,
        # Its own table is printed by nobody; ours is.
        stats=[],
        debug=False,
        callbacks=[on_plan] if on_plan is not None else None,
    )
