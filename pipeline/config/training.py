"""How a model learns, lies on devices, computes and is saved."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pydantic import with_config

from pipeline.config.strict import STRICT

SparseOptimizer = Literal["rowwise_adagrad", "adagrad", "adam", "sgd"]


@with_config(STRICT)
@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How parameters learn. Tables learn in the backward pass (fused), dense parameters after it."""

    dense: Literal["adam", "adamw", "adagrad", "sgd"] = "adam"
    dense_lr: float = 1e-3
    """Learning rate of dense parameters."""
    dense_weight_decay: float = 0.0
    sparse: SparseOptimizer = "rowwise_adagrad"
    sparse_lr: float = 0.02
    """Learning rate of embedding tables."""
    table_optimizers: dict[str, SparseOptimizer] = field(default_factory=dict)
    """Optimizers of single tables, in place of sparse."""
    table_lrs: dict[str, float] = field(default_factory=dict)
    """Learning rates of single tables, in place of sparse_lr; they warm up and decay alike."""
    warmup_steps: int = 0
    """Steps over which both rates rise from zero."""
    decay: Literal["none", "linear"] = "linear"
    """Whether both rates fall to zero at the last step."""
    clip_gradient_norm: float | None = None
    """Clip the norm of dense gradients; none given does not."""

    def of_table(self, table: str) -> tuple[SparseOptimizer, float]:
        """Optimizer and learning rate of a table."""
        return self.table_optimizers.get(table, self.sparse), self.table_lrs.get(table, self.sparse_lr)


@with_config(STRICT)
@dataclass(frozen=True, kw_only=True)
class AssumedTable:
    """A table, or several alike, of a log that is not there yet; for `trefoil plan` without --data."""

    name: str
    """Name of the feature and of its table; with count above 1 each gets a number."""
    rows: int
    """Rows of each."""
    level: Literal["request", "candidate", "shared"] = "candidate"
    """Pooled once a request, pooled once a candidate, or shared by candidates and the history's events."""
    count: int = 1
    """How many tables of this kind."""


@with_config(STRICT)
@dataclass(frozen=True, kw_only=True)
class WorkloadConfig:
    """What the planner is told of the log beside its schema; it bends no result, only where tables lie."""

    candidates_per_request: float = 16.0
    """Mean candidates of a request; a log at hand knows better."""
    ids_per_row: dict[str, float] = field(default_factory=dict)
    """Mean ids of a feature per row that is looked up; 1 where not named, for histories their length."""
    history_length: int = 0
    """Events of a history where no log says; 0 for none."""
    tables: tuple[AssumedTable, ...] = ()
    """Tables to plan without a log."""


@with_config(STRICT)
@dataclass(frozen=True, kw_only=True)
class ShardingConfig:
    """How tables are spread over ranks."""

    tables: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Sharding types allowed for a table, such as row_wise; tables not named may lie table_wise or row_wise."""
    kernels: tuple[str, ...] = ("fused",)
    """Compute kernels allowed for tables: fused lies in the device's memory; on CUDA fused_uvm_caching lies in the
    host's with a cache on the device, fused_uvm in the host's alone. The planner chooses among them."""
    table_kernels: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Kernels of single tables, in place of kernels."""
    min_partition: dict[str, int] = field(default_factory=dict)
    """Least columns of a shard of a table that lies column-wise; it must divide the dimension. TorchRec's is 128."""
    cache_load_factor: float = 0.2
    """Share of a fused_uvm_caching table's rows that its cache on the device holds."""
    table_cache_load_factors: dict[str, float] = field(default_factory=dict)
    """Shares of single tables, in place of cache_load_factor."""
    exchange: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Precision in which embeddings and their gradients travel between ranks."""
    reserved_memory: float = 0.3
    """Share of a device's and a host's memory that the planner leaves to dense parameters, activations and buffers."""
    pipeline: bool = True
    """Overlap the exchange of ids with training (TrainPipelineSparseDist)."""
    prefetch: bool = False
    """Fill the caches of fused_uvm_caching tables one batch ahead (PrefetchTrainPipelineSparseDist); CUDA only."""
    workload: WorkloadConfig = WorkloadConfig()


@with_config(STRICT)
@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    steps: int | None = None
    """Steps between checkpoints; none given writes one at the end, and one when the run is told to leave."""
    keep_newest: int = 2
    """Checkpoints kept of those that have trained longest."""
    best_metric: str | None = None
    """Metric by which the best are kept too, such as train/click/loss or, day after day, next/hf/click/auc; none
    given keeps the newest alone."""
    best_is: Literal["lowest", "highest"] = "lowest"
    """Whether the best has the lowest or the highest value of best_metric."""
    keep_best: int = 1
    """Checkpoints kept of the best, beside the newest."""
    asynchronous: bool = True
    """Write while training goes on; without it training waits for the disk."""


@with_config(STRICT)
@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How the dense part computes. None of it changes what is learnt, but for rounding."""

    deterministic: bool = True
    """On CUDA, algorithms that add in the same order every time, so that a run gives the same bits when it is repeated
    or resumed (no effect on CPU, which always does)."""
    tf32: bool = True
    """Allow TF32 matrix products where the hardware has them (no effect on CPU)."""
    bf16: bool = False
    """Train the dense part under bfloat16 autocast; weights, losses, tables and scoring stay float32."""
    compile: bool = False
    """Compile the crossing, deep and feed-forward blocks (torch.compile)."""
    micro_batches: int = 1
    """Send a batch through the dense part in so many pieces, keeping the activations of one at a time: the same step
    as in one piece, for one more forward pass. Tables are looked up and learn once a batch."""
