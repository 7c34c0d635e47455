"""TorchRec's train pipelines, which must hold every sharded module or say why not."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torchrec.distributed.train_pipeline import (
    PrefetchTrainPipelineSparseDist,
    TrainPipelineBase,
    TrainPipelineSparseDist,
)
from torchrec.distributed.types import ShardedModule

from components.cross import CrossProjection, DCNv2
from components.engagement_model import EngagementBody
from components.history import FeedForward
from components.mlp import SplitMLP
from pipeline.config import ShardingConfig
from pipeline.errors import ConfigError

TRACER = "torchrec.distributed.train_pipeline"


class _Whole(TrainPipelineSparseDist[Any, Any]):
    """Overlaps the exchange of ids with training, for all sharded modules or for none.

    TorchRec traces the model at its first batch and leaves out a module whose input is not an untouched part of the
    batch, with a warning that few see; the step is then slower than it need be.
    """

    def _pipeline_model(self, *args: Any, **kwargs: Any) -> None:
        with _warnings() as heard:
            super()._pipeline_model(*args, **kwargs)
        missing = unpipelined(self._model, self._pipelined_modules)
        if missing:
            causes = "\n  - ".join(dict.fromkeys(heard)) or "TorchRec's tracer did not meet a call of it"
            raise ConfigError(
                f"{', '.join(missing)} fell out of the train pipeline:\n  - {causes}\n"
                "Feed each collection an attribute of the batch as it is, and change ids in pipeline/data/batch.py; "
                "or set sharding.pipeline to False and train without overlap"
            )


class _WholePrefetch(_Whole, PrefetchTrainPipelineSparseDist[Any, Any]):
    """The same, and fills the caches of tables in the host's memory one batch ahead."""


class _OneByOne(TrainPipelineBase[Any, Any]):
    """Without overlap, for one run of batches after another: TorchRec's own ends for good with the first."""

    def progress(self, dataloader_iter: Iterator[Any]) -> Any:
        try:
            return super().progress(dataloader_iter)
        except StopIteration:
            self._reset_data_iter()
            raise


def build_pipeline(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, config: ShardingConfig, device: torch.device
) -> TrainPipelineBase[Any, Any] | TrainPipelineSparseDist[Any, Any]:
    """The pipeline that a run asks for.

    Its first step raises a ConfigError that names each sharded module that cannot be pipelined, and why.
    """
    if not config.pipeline:
        return _OneByOne(model, optimizer, device)
    return (_WholePrefetch if config.prefetch else _Whole)(model, optimizer, device)


# The dense part's large blocks that eat tensors alone. What lies between them, jagged rows, breaks a graph apart and
# would be translated over and over.
_COMPILED = (CrossProjection, DCNv2, FeedForward, SplitMLP)


def compile_blocks(body: EngagementBody) -> list[str]:
    """Let torch.compile translate crossing, deep and feed-forward blocks at their first call, for any number of rows.

    Returns:
        Their names in `body`.
    """
    names: list[str] = []
    for name, module in body.named_modules():
        # A block within one that is compiled is part of it.
        if isinstance(module, _COMPILED) and not any(name.startswith(f"{n}.") for n in names):
            module.compile(dynamic=True)
            names.append(name)
    return names


def sharded_modules(model: torch.nn.Module) -> dict[str, ShardedModule[Any, Any, Any, Any]]:
    """Sharded modules of a model by their name in it."""
    inner = getattr(model, "module", model)
    return {name: m for name, m in inner.named_modules() if isinstance(m, ShardedModule)}


def unpipelined(model: torch.nn.Module, pipelined: list[Any]) -> list[str]:
    """Names of the sharded modules that are not among the pipelined ones."""
    inside = {id(m) for m in pipelined}
    return [name for name, m in sharded_modules(model).items() if id(m) not in inside]


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """What TorchRec's tracer warns of in here, also where its logger is kept quiet."""
    heard: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    logger, ear = logging.getLogger(TRACER), Ear(level=logging.WARNING)
    before = logger.level
    logger.addHandler(ear)
    logger.setLevel(logging.WARNING)
    try:
        yield heard
    finally:
        logger.removeHandler(ear)
        logger.setLevel(before)
