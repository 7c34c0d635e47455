"""What a run is: frozen dataclasses, one field one knob, its meaning in the string beneath it.

A recipe is a function that returns a whole `RunConfig`. Ranges of single fields are checked where they are
used; what must fit together is checked here, and every problem is reported at once.
"""

from __future__ import annotations

from pipeline.config.data import DaysConfig, Exhaustion, LoaderConfig
from pipeline.config.model import HistoryConfig, MixtureConfig, ModelConfig, ProjectionConfig
from pipeline.config.run import (
    RunConfig,
    config_from_json,
    config_to_json,
    default_home,
    flat_config,
    with_fields,
)
from pipeline.config.strict import STRICT
from pipeline.config.training import (
    AssumedTable,
    CheckpointConfig,
    ComputeConfig,
    OptimizerConfig,
    ShardingConfig,
    SparseOptimizer,
    WorkloadConfig,
)

__all__ = [
    "STRICT",
    "AssumedTable",
    "CheckpointConfig",
    "ComputeConfig",
    "DaysConfig",
    "Exhaustion",
    "HistoryConfig",
    "LoaderConfig",
    "MixtureConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ProjectionConfig",
    "RunConfig",
    "ShardingConfig",
    "SparseOptimizer",
    "WorkloadConfig",
    "config_from_json",
    "config_to_json",
    "default_home",
    "flat_config",
    "with_fields",
]
