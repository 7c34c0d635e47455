"""What a run is: frozen dataclasses, one field one knob, its meaning in the string beneath it.

A recipe is a function that returns a whole `RunConfig`. Ranges of single fields are checked where they are
used; what must fit together is checked here, and every problem is reported at once.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from pipeline.errors import ConfigError, unknown

# A field that nobody knows is an error, not a knob that turns nothing.
STRICT = ConfigDict(extra="forbid")
Exhaustion = Literal["stop", "repeat", "drop_out"]
SparseOptimizer = Literal["rowwise_adagrad", "adagrad", "adam", "sgd"]


@with_config(STRICT)
@dataclass(frozen=True, kw_only=True)
class DaysConfig:
    """Which days of the log are trained on, validated on and tested on; always in this order of time."""

    first: str | None = None
    """First day to use, such as 2022-04-25; none given is the log's first."""
    last: str | None = None
    """Last day to use; none given is the log's last."""
    validation: int = 1
    """Days before the test days that are held out for choosing."""
    test: int = 1
    """Last days, scored once at the end."""


@with_config(STRICT)
@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How batches are made from a log."""

    requests_per_batch: int = 512
    """Requests of one global batch, over all ranks."""
    surface_weights: dict[str, float] | None = None
    """Share of each surface in a batch; none given is the natural share."""
    temperature: float | None = None
    """Shares by size ** (1 / temperature), in place of surface_weights."""
    exhaustion: Exhaustion = "drop_out"
    """What happens when a surface runs out first: stop, repeat or drop_out."""
    history_length: int | None = None
    """Keep at most this many of the newest events of a history; none given keeps what the log has."""
    shuffle: bool = True
    """Shuffle requests within a surface; without it they come in the order of the files."""
    lanes: int = 32
    """Independent pieces of a surface's epoch: the most ranks that can read it. Part of the order of data."""
    window: int = 512
    """Requests of a lane that are shuffled and held in memory together. Part of the order of data."""
    prefetch_batches: int = 4
    """Batches made ahead of the step that needs them; 0 makes them in the caller's thread."""
    bad_input: Literal["raise", "quarantine"] = "raise"
    """Stop at the first row group that is damaged or holds what it must not, or leave such row groups out,
    counted and reported; steps stay as they are, with fewer requests."""
    max_candidates: int | None = None
    """The most candidates of one request row in a batch; none given sets no bound."""
    past_max_candidates: Literal["split", "cap"] = "split"
    """A request with more becomes several rows of the same batch, or loses the candidates past the bound, counted."""


@with_config(STRICT)
@dataclass(frozen=True, kw_only=True)
class HistoryConfig:
    """What becomes of a user's history."""

    kind: Literal["transformer", "attention", "target", "din", "state", "mean", "none"] = "transformer"
    """Transformer encoder with candidates attending to it; the same attention over bare events; a small activation
    unit with softmax over bare events; DIN's unit as published; a state summed over gated, decaying events; the mean
    of the bare events; nothing."""
    width: int = 32
    """Width of an encoded event."""
    layers: int = 1
    """Transformer layers."""
    heads: int = 2
    """Attention heads of encoder and candidates."""
    causal: bool = False
    """Let an event attend only to earlier ones."""
    dropout: float = 0.0
    """Dropout in the encoder."""


@with_config(STRICT)
@dataclass(frozen=True, kw_only=True)
class ProjectionConfig:
    """How the wide history output becomes narrow before crossing."""

    kind: Literal["dcn", "linear", "none"] = "dcn"
    """DCNv2 layers and a linear map; a linear map alone; or the full width."""
    width: int = 32
    """Projected width P."""
    layers: int = 1
    """Cross layers of the projection."""
    rank: int = 16
    """Rank of its cross layers."""


@with_config(STRICT)
@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """What lies between the trunk and the towers."""

    kind: Literal["mmoe", "ple", "shared_bottom", "none"] = "mmoe"
    """Experts with gates per surface and task; own beside shared experts (PLE); one shared layer; nothing."""
    experts: int = 4
    """Experts of an MMoE; shared experts of a PLE."""
    own_experts: int = 1
    """Experts of each surface at each level of a PLE."""
    levels: int = 2
    """Levels of a PLE."""
    hidden: tuple[int, ...] = (64,)
    """Sizes of the layers of each expert."""


@with_config(STRICT)
@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The blocks of a model and their sizes."""

    embedding_dim: int = 16
    """Dimension D of an embedding row; tables fed by sequences all share it."""
    table_scale: float | None = 0.05
    """Tables start uniform in [-scale, scale); none given is 1 / sqrt(rows) of each table (DLRM, Naumov et al. 2019),
    so that what few ids share is there from the start and what many ids hold must be learned."""
    table_dims: dict[str, int] = field(default_factory=dict)
    """Dimensions of single tables (vocabularies) that are only pooled in bags."""
    history: HistoryConfig = HistoryConfig()
    projection: ProjectionConfig = ProjectionConfig()
    cross_layers: int = 2
    """DCNv2 layers beside the deep part; 0 leaves them out."""
    cross_rank: int = 32
    """Rank of the DCNv2 layers."""
    deep: tuple[int, ...] = (128, 64)
    """Sizes of the deep part's layers."""
    surface_gate: bool = False
    """Gate the trunk's input by surface (EPNet)."""
    mixture: MixtureConfig = MixtureConfig()
    towers: Literal["per_surface", "residual", "star", "shared"] = "per_surface"
    """A tower tree for each surface; one for all plus a correction for each; STAR's network; one for all."""
    tower_hidden: tuple[int, ...] = (32,)
    """Sizes of a tower's layers."""
    late_fusion: bool = True
    """Feed features that only one surface has to its tower alone, not to the trunk."""
    calibration: Literal["per_surface", "monotone", "global", "none"] = "per_surface"
    """Affine per surface and task; monotone pieces per surface and task; one affine for all; none."""
    dropout: float = 0.0
    """Dropout in the deep part and the towers."""


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

    tf32: bool = True
    """Allow TF32 matrix products where the hardware has them (no effect on CPU)."""
    bf16: bool = False
    """Train the dense part under bfloat16 autocast; weights, losses, tables and scoring stay float32."""
    compile: bool = False
    """Compile the dense part (torch.compile)."""
    micro_batches: int = 1
    """Send a batch through the dense part in so many pieces, keeping the activations of one at a time: the same step
    as in one piece, for one more forward pass. Tables are looked up and learn once a batch."""


@with_config(STRICT)
@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run, whole."""

    name: str
    """Name of the recipe; runs of the same name are compared in one experiment."""
    surfaces: tuple[str, ...]
    """Surfaces that train and export, in batch order."""
    tasks: tuple[str, ...]
    """Labels to predict."""
    exclude: tuple[str, ...] = ()
    """Features of the log to leave out, by name or pattern (*_rate_*); history_item leaves out the history."""
    task_weights: dict[str, float] = field(default_factory=dict)
    """Weight of a task's loss; 1 where not named."""
    seed: int = 0
    """Seed of the order of data and of the initial weights."""
    epochs: int = 1
    """Passes over the training days."""
    days: DaysConfig = DaysConfig()
    loader: LoaderConfig = LoaderConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    sharding: ShardingConfig = ShardingConfig()
    compute: ComputeConfig = ComputeConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    timeout_s: float = 1800.0
    """A rank that finishes no step for this long is taken for hung: the stacks of all ranks are written to the run's
    folder and the job ends, for its launcher to start it again."""
    log_steps: int = 50
    """Steps between logged training metrics."""
    recalibration_prior: float | None = None
    """After training, fit the biases of the calibration once more on the validation days, each held to its trained
    value by a prior of this standard deviation, in logits (0.1: a day's rates drift by a tenth or so); none given
    leaves them."""
    bootstrap_resamples: int = 200
    """Resamples of users behind each interval."""

    def __post_init__(self) -> None:
        problems = (
            _at_least(
                1,
                epochs=self.epochs,
                **{"model.history.heads": self.model.history.heads},
                log_steps=self.log_steps,
                bootstrap_resamples=self.bootstrap_resamples,
                **{"checkpoint.steps": 1 if self.checkpoint.steps is None else self.checkpoint.steps},
                **{f"checkpoint.{k}": getattr(self.checkpoint, k) for k in ("keep_newest", "keep_best")},
                **{"compute.micro_batches": self.compute.micro_batches},
                **{f"loader.{k}": getattr(self.loader, k) for k in ("requests_per_batch", "lanes", "window")},
                **{
                    f"loader.{k}": 1 if getattr(self.loader, k) is None else getattr(self.loader, k)
                    for k in ("history_length", "max_candidates")
                },
            )
            + _at_least(
                0,
                **{"loader.prefetch_batches": self.loader.prefetch_batches},
                **{"days.validation": self.days.validation, "days.test": self.days.test},
                **{"optimizer.warmup_steps": self.optimizer.warmup_steps},
            )
            + self._cross_problems()
        )
        if problems:
            raise ConfigError(f"the run {self.name!r} cannot work:\n  - " + "\n  - ".join(problems))

    def _cross_problems(self) -> list[str]:
        problems = []
        if not self.surfaces:
            problems.append("surfaces is empty; name at least one")
        if not self.tasks:
            problems.append("tasks is empty; name at least one")
        if len(set(self.surfaces)) < len(self.surfaces):
            problems.append("surfaces names a surface twice")
        for task in self.task_weights:
            if task not in self.tasks:
                problems.append("task_weights: " + unknown("task", task, self.tasks))
        for surface in self.loader.surface_weights or {}:
            if surface not in self.surfaces:
                problems.append("loader.surface_weights: " + unknown("surface", surface, self.surfaces))
        if self.loader.surface_weights is not None and self.loader.temperature is not None:
            problems.append("loader.surface_weights and loader.temperature are both given; choose one")
        if self.days.first and self.days.last and self.days.first > self.days.last:
            problems.append(f"days.first {self.days.first} is after days.last {self.days.last}")
        if not self.timeout_s > 0:
            problems.append(f"timeout_s is {self.timeout_s}; it must be positive")
        prior = self.recalibration_prior
        if prior is not None:
            if not prior > 0:
                problems.append(f"recalibration_prior is {prior}; it must be above 0")
            if self.model.calibration == "none":
                problems.append("recalibration_prior is set and model.calibration is none: there is no bias to move")
            if not self.days.validation:
                problems.append("recalibration_prior is set and days.validation is 0: there is no day to fit it on")
        sharding = self.sharding
        for name, share in {
            "cache_load_factor": sharding.cache_load_factor,
            "reserved_memory": sharding.reserved_memory,
            **{f"table_cache_load_factors.{t}": v for t, v in sharding.table_cache_load_factors.items()},
        }.items():
            if not 0 < share < 1:
                problems.append(f"sharding.{name} is {share}; it must lie between 0 and 1")
        if sharding.prefetch and not sharding.pipeline:
            problems.append("sharding.prefetch needs sharding.pipeline; switch both on, or prefetch off")
        if not sharding.kernels:
            problems.append("sharding.kernels is empty; name at least one, such as fused")
        history = self.model.history
        if history.heads >= 1 and history.kind in ("transformer", "attention") and history.width % history.heads:
            problems.append(
                f"model.history.width {history.width} is not a multiple of model.history.heads {history.heads}"
            )
        if self.model.towers == "star" and self.model.mixture.kind in ("mmoe", "ple"):
            problems.append(
                "model.towers is star, which reads one vector a row, and model.mixture gives one a task; "
                "set model.mixture.kind to none or shared_bottom"
            )
        return problems


def _at_least(least: int, **values: int) -> list[str]:
    return [f"{name} is {value}; it must be at least {least}" for name, value in values.items() if value < least]


_RUN = TypeAdapter(RunConfig)


def config_to_json(config: RunConfig) -> bytes:
    """The whole configuration as JSON."""
    return _RUN.dump_json(config, indent=1)


def config_from_json(text: bytes, *, source: str) -> RunConfig:
    """A configuration read back; `source` names it in errors.

    Raises:
        ConfigError: the text is not a configuration of this version.
    """
    try:
        return _RUN.validate_json(text)
    except ValidationError as error:
        lines = [f"{'.'.join(str(p) for p in e['loc']) or 'file'}: {e['msg']}" for e in error.errors()]
        raise ConfigError(f"{source} is not a run configuration:\n  - " + "\n  - ".join(lines)) from error


def flat_config(config: RunConfig) -> dict[str, str]:
    """Every field as `section.field`, for run tables."""

    def walk(prefix: str, value: Any) -> dict[str, str]:
        if isinstance(value, dict) and value:
            return {k: v for name, part in value.items() for k, v in walk(f"{prefix}{name}.", part).items()}
        return {prefix.rstrip("."): str(value)}

    return walk("", _RUN.dump_python(config, mode="json"))


def default_home() -> Path:
    """Where runs are kept: `TREFOIL_HOME`, or `runs` in the current folder."""
    return Path(os.environ.get("TREFOIL_HOME", "runs"))
