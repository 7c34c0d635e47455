"""A recipe at the scale of a large ads platform, for `trefoil plan`: no log comes with it."""

from __future__ import annotations

from pipeline.config import (
    AssumedTable,
    HistoryConfig,
    LoaderConfig,
    MixtureConfig,
    ModelConfig,
    OptimizerConfig,
    ProjectionConfig,
    RunConfig,
    ShardingConfig,
    WorkloadConfig,
)


def ten_terabytes() -> RunConfig:
    """120 tables of 19.5 billion rows of 128 float32 in all: 10.0 TB of weights."""
    return RunConfig(
        name="ten_terabytes",
        surfaces=("hf", "sr", "rp"),
        tasks=("click", "long_click", "save", "hide"),
        loader=LoaderConfig(requests_per_batch=65536),
        model=ModelConfig(
            embedding_dim=128,
            history=HistoryConfig(kind="transformer", width=128, layers=2, heads=4),
            projection=ProjectionConfig(),
            mixture=MixtureConfig(),
            deep=(1024, 512),
            tower_hidden=(256, 128),
            cross_rank=256,
        ),
        optimizer=OptimizerConfig(dense="adamw", warmup_steps=2000),
        sharding=ShardingConfig(
            kernels=("fused", "fused_uvm_caching"),
            cache_load_factor=0.1,
            exchange="bf16",
            prefetch=True,
            workload=WorkloadConfig(
                candidates_per_request=16,
                history_length=256,
                tables=(
                    AssumedTable(name="item", rows=1_000_000_000, level="shared"),
                    AssumedTable(name="user", rows=1_000_000_000, level="request", count=3),
                    AssumedTable(name="ad", rows=1_000_000_000, level="candidate", count=4),
                    AssumedTable(name="request_large", rows=400_000_000, level="request", count=6),
                    AssumedTable(name="candidate_large", rows=400_000_000, level="candidate", count=10),
                    AssumedTable(name="request_middle", rows=120_500_000, level="request", count=12),
                    AssumedTable(name="candidate_middle", rows=120_500_000, level="candidate", count=20),
                    AssumedTable(name="request_small", rows=20_000_000, level="request", count=24),
                    AssumedTable(name="candidate_small", rows=20_000_000, level="candidate", count=40),
                ),
            ),
        ),
    )
