"""What TorchRec's planner may do with each table, and how much each table is looked up.

Shape letters: R requests, C candidates of a rank's share of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, ShardingType
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import CacheParams, ModuleSharder, QuantizedCommCodecs

from pipeline.config import OptimizerConfig, ShardingConfig
from pipeline.errors import ConfigError, unknown
from pipeline.train.model_plan import ModelPlan
from pipeline.train.tables import table_of

SHARDING_TYPES = tuple(t.value for t in ShardingType)
TABLE_WISE, ROW_WISE = ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value
TABLE_ROW_WISE = ShardingType.TABLE_ROW_WISE.value
DATA_PARALLEL = ShardingType.DATA_PARALLEL.value
# These split a table's rows, so that pooled rows are summed over ranks: a reduce-scatter.
ROWS_SPLIT = (ROW_WISE, TABLE_ROW_WISE, ShardingType.GRID_SHARD.value)
COLUMNS_SPLIT = tuple(
    t.value for t in (ShardingType.COLUMN_WISE, ShardingType.TABLE_COLUMN_WISE, ShardingType.GRID_SHARD)
)
SEQUENCE_TYPES = (TABLE_WISE, ROW_WISE, ShardingType.COLUMN_WISE.value, DATA_PARALLEL)
FUSED, DENSE = EmbeddingComputeKernel.FUSED.value, EmbeddingComputeKernel.DENSE.value
CACHED = EmbeddingComputeKernel.FUSED_UVM_CACHING.value
KERNELS = (FUSED, CACHED, EmbeddingComputeKernel.FUSED_UVM.value)


class BagSharder(EmbeddingBagCollectionSharder):
    """TorchRec's, which on CPU leaves out the types that split rows although they work over gloo."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        offered = super().sharding_types(compute_device_type)
        return offered + [t for t in ROWS_SPLIT if t not in offered]


def sharders(exchange: str) -> list[ModuleSharder[nn.Module]]:
    """The sharders of the collections that models are made of.

    Args:
        exchange: precision in which embeddings and gradients travel: fp32, fp16 or bf16.
    """
    codecs: dict[str, QuantizedCommCodecs] | None = None
    if exchange != "fp32":
        precision = CommType(exchange)
        codecs = get_qcomm_codecs_registry(QCommsConfig(forward_precision=precision, backward_precision=precision))
    return [
        cast(ModuleSharder[nn.Module], BagSharder(qcomm_codecs_registry=codecs)),
        cast(ModuleSharder[nn.Module], EmbeddingCollectionSharder(qcomm_codecs_registry=codecs)),
    ]


@dataclass(frozen=True, kw_only=True)
class TableLoad:
    """How much a table is looked up, one entry a feature.

    Args:
        ids_per_row: mean ids in a row (the planner's pooling factor).
        rows: rows of a rank's batch: R for request features and sequences, C for pooled candidate features.
    """

    ids_per_row: tuple[float, ...]
    rows: tuple[int, ...]


def table_loads(plan: ModelPlan, *, requests_per_rank: int, candidates_per_request: float) -> dict[str, TableLoad]:
    """The load of every table of a model.

    Args:
        plan: the model; its configuration's workload names mean ids.
        requests_per_rank: R.
        candidates_per_request: mean over the log.

    Raises:
        ConfigError: the workload names a feature that the model does not read.
    """
    layout, known = plan.layout, plan.config.sharding.workload.ids_per_row
    keys = layout.request_bags + layout.candidate_bags + layout.sequence_keys
    for name in known:
        if name not in keys:
            raise ConfigError("sharding.workload.ids_per_row: " + unknown("feature", name, keys))
    candidates = max(round(requests_per_rank * candidates_per_request), 1)
    history = float(min(plan.config.loader.history_length or plan.schema.history_length, plan.schema.history_length))
    found: dict[str, list[tuple[float, int]]] = {}
    for names, ids, rows in (
        (layout.request_bags, 1.0, requests_per_rank),
        (layout.candidate_bags, 1.0, candidates),
        (layout.history_sequences, history, requests_per_rank),
        (layout.request_sequences, 1.0, requests_per_rank),
        (layout.candidate_sequences, candidates_per_request, requests_per_rank),
    ):
        for name in names:
            found.setdefault(layout.vocabularies[name], []).append((known.get(name, ids), rows))
    return {
        table: TableLoad(ids_per_row=tuple(i for i, _ in load), rows=tuple(r for _, r in load))
        for table, load in found.items()
    }


def table_constraints(
    module: nn.Module,
    config: ShardingConfig,
    optimizer: OptimizerConfig,
    *,
    device: str,
    loads: Mapping[str, TableLoad] | None = None,
) -> dict[str, ParameterConstraints]:
    """The planner's constraints for the tables of a module.

    Only what trains like an unsharded table is let through, so that a plan never changes a result: splitting columns
    splits the row over which RowWiseAdagrad averages, and a data-parallel table has a dense Adam, which moves rows
    that a batch does not hold, where the fused one leaves them alone.

    Args:
        module: holds the tables.
        config: what the run allows.
        optimizer: of the tables.
        device: "cuda" or "cpu".
        loads: how much tables are looked up; none given is once a request.

    Raises:
        ConfigError: every setting that TorchRec does not have, or that cannot work, in one message.
    """
    tables = {table: name for name, _ in module.named_parameters() if (table := table_of(name)) is not None}
    problems = _unknown_tables(config, optimizer, tables)
    if device == "cpu" and (adam := sorted(t for t in tables if optimizer.of_table(t)[0] == "adam")):
        problems.append(
            f"optimizer: FBGEMM has no fused adam on CPU, asked for {', '.join(adam)}; set optimizer.sparse or "
            "optimizer.table_optimizers to rowwise_adagrad, adagrad or sgd"
        )
    if config.prefetch and device == "cpu":
        problems.append("sharding.prefetch fills caches in the memory of a CUDA device; on CPU leave it off")
    constraints = {}
    for table, name in tables.items():
        is_bag = ".embedding_bags." in name or name.startswith("embedding_bags.")
        types = config.tables.get(table, default_types(is_bag, device))
        kernels = config.table_kernels.get(table, config.kernels)
        problems += [
            f"sharding: table {table!r}: {problem}"
            for problem in _type_problems(types, is_bag, optimizer.of_table(table)[0], device, config.exchange)
            + _kernel_problems(kernels, device)
        ]
        load = (loads or {}).get(table)
        constraints[table] = ParameterConstraints(
            sharding_types=list(types),
            # A data-parallel table has no other kernel, and no other type has this one.
            compute_kernels=[*kernels, *([DENSE] if DATA_PARALLEL in types else [])],
            min_partition=config.min_partition.get(table),
            cache_params=_cache(config, table, cached=CACHED in kernels),
            **({"pooling_factors": list(load.ids_per_row), "batch_sizes": list(load.rows)} if load else {}),
        )
    if problems:
        raise ConfigError("tables cannot lie as asked:\n  - " + "\n  - ".join(problems))
    return constraints


def _cache(config: ShardingConfig, table: str, *, cached: bool) -> CacheParams | None:
    """Of a table with a cache. A pipeline that prefetches hands batches ahead to tables without one too, which must
    know of it."""
    if cached:
        share = config.table_cache_load_factors.get(table, config.cache_load_factor)
        return CacheParams(load_factor=share, prefetch_pipeline=config.prefetch)
    return CacheParams(prefetch_pipeline=True) if config.prefetch else None


def default_types(is_bag: bool, device: str) -> tuple[str, ...]:
    """Sharding types of a table that the run does not name: those under which every optimizer learns the same.

    On CPU pooled tables lie whole: splitting their rows costs an exchange of every pooled row and gains no memory.
    """
    if not is_bag:
        return (TABLE_WISE, ROW_WISE)
    return (TABLE_WISE,) if device == "cpu" else (TABLE_WISE, ROW_WISE, TABLE_ROW_WISE)


def _unknown_tables(config: ShardingConfig, optimizer: OptimizerConfig, tables: Mapping[str, str]) -> list[str]:
    named: dict[str, Mapping[str, object]] = {
        "sharding.tables": config.tables,
        "sharding.table_kernels": config.table_kernels,
        "sharding.min_partition": config.min_partition,
        "sharding.table_cache_load_factors": config.table_cache_load_factors,
        "optimizer.table_optimizers": optimizer.table_optimizers,
        "optimizer.table_lrs": optimizer.table_lrs,
    }
    return [
        f"{field}: " + unknown("table", table, tables)
        for field, values in named.items()
        for table in values
        if table not in tables
    ]


def _type_problems(types: tuple[str, ...], is_bag: bool, optimizer: str, device: str, exchange: str) -> list[str]:
    problems = []
    for kind in types:
        if kind not in SHARDING_TYPES:
            problems.append(unknown("sharding type", kind, SHARDING_TYPES))
        elif not is_bag and kind not in SEQUENCE_TYPES:
            problems.append(f"sequences cannot lie {kind}; choose among {', '.join(SEQUENCE_TYPES)}")
        elif kind in COLUMNS_SPLIT and optimizer == "rowwise_adagrad":
            problems.append(
                f"{kind} splits the row that rowwise_adagrad averages over, so the plan would change what is learnt; "
                "set optimizer.table_optimizers to adagrad, adam or sgd, or choose table_wise or row_wise"
            )
        elif kind == DATA_PARALLEL and optimizer == "adam":
            problems.append(
                "data_parallel has no fused adam, and a dense one also moves rows that a batch does not hold; "
                "set optimizer.table_optimizers to rowwise_adagrad, adagrad or sgd, or choose another type"
            )
        elif kind == DATA_PARALLEL and not is_bag and device == "cpu":
            problems.append("data_parallel sequences do not work on CPU: FBGEMM's dense kernel pools them there")
        elif kind in ROWS_SPLIT and is_bag and device == "cpu" and exchange == "bf16":
            problems.append(
                f"{kind} bags over gloo cannot exchange bf16: its encoding has no gradient there; "
                "set sharding.exchange to fp16 or fp32, or choose table_wise"
            )
    return problems


def _kernel_problems(kernels: tuple[str, ...], device: str) -> list[str]:
    problems = [unknown("kernel", kernel, KERNELS) for kernel in kernels if kernel not in KERNELS]
    if device == "cpu" and FUSED not in kernels:
        problems.append(f"on CPU the only kernel is {FUSED}, not {', '.join(kernels)}")
    return problems
