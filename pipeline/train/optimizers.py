"""Optimizers: torch's and TorchRec's, put together for fused tables, data-parallel tables and dense parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import SGD, Adagrad, Adam, in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.optim.warmup import WarmupOptimizer, WarmupPolicy, WarmupStage

from pipeline.config import OptimizerConfig
from pipeline.train.tables import table_of

# Classes by which TorchRec knows FBGEMM's fused optimizers.
FUSED_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "rowwise_adagrad": RowWiseAdagrad,
    "adagrad": Adagrad,
    "adam": Adam,
    "sgd": SGD,
}
# The same rules over whole tables, for data-parallel ones, which have no fused kernel.
REPLICATED_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "rowwise_adagrad": RowWiseAdagrad,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
}
DENSE_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
}
EPSILON = 1e-8


def _table_arguments(name: str, lr: float) -> dict[str, Any]:
    return {"lr": lr} if name == "sgd" else {"lr": lr, "eps": EPSILON}


def fuse_optimizers(module: nn.Module, config: OptimizerConfig) -> None:
    """Give each table of a module that is not yet sharded its optimizer in the backward pass."""
    for name, parameter in module.named_parameters():
        table = table_of(name)
        if table is not None:
            optimizer, lr = config.of_table(table)
            _apply_optimizer_in_backward(FUSED_OPTIMIZERS[optimizer], [parameter], _table_arguments(optimizer, lr))


def build_optimizer(model: DistributedModelParallel, config: OptimizerConfig, *, total_steps: int) -> CombinedOptimizer:
    """One optimizer over all parameters, with the same warm-up and decay for each of its parts.

    Its parts: "tables" (fused, the run's rate), "tables_at_LR" (fused, a rate of their own), "replicated_NAME" (one for
    each data-parallel table), "dense".

    Args:
        model: the sharded model.
        config: what to use.
        total_steps: steps of the whole run, at whose end a linear decay reaches zero.
    """

    def scheduled(optimizer: KeyedOptimizer, lr: float) -> KeyedOptimizer:
        return WarmupOptimizer(optimizer, schedule(config, total_steps), lr=lr)

    parts = [(_part_name(config, lr), scheduled(CombinedOptimizer(fused), lr)) for lr, fused in _by_rate(model, config)]
    dense, replicated = {}, {}
    for name, parameter in in_backward_optimizer_filter(model.named_parameters()):
        if (table := table_of(name)) is None:
            dense[name] = parameter
        else:
            replicated[table] = (name, parameter)
    for table, (name, parameter) in sorted(replicated.items()):
        kind, lr = config.of_table(table)
        parts.append((f"replicated_{table}", scheduled(_keyed({name: parameter}, kind, lr), lr)))
    parts.append(("dense", scheduled(_dense(dense, config), config.dense_lr)))
    return CombinedOptimizer(parts)


def _part_name(config: OptimizerConfig, lr: float) -> str:
    return "tables" if lr == config.sparse_lr else f"tables_at_{lr:g}"


def _by_rate(
    model: DistributedModelParallel, config: OptimizerConfig
) -> list[tuple[float, list[KeyedOptimizer | tuple[str, KeyedOptimizer]]]]:
    """Fused optimizers by learning rate: every rate of the run, also where this rank holds no such table."""
    rates = dict.fromkeys([config.sparse_lr, *sorted(set(config.table_lrs.values()))])
    found: dict[float, list[KeyedOptimizer | tuple[str, KeyedOptimizer]]] = {lr: [] for lr in rates}
    for name, optimizer in _leaves("", model.fused_optimizer):
        # A kernel holds tables of one optimizer and one rate.
        table = next((table_of(CombinedOptimizer.prepend_opt_key(key, name)) for key in optimizer.params), None)
        if table is not None:
            found[config.of_table(table)[1]].append((name, optimizer))
    return list(found.items())


def _leaves(name: str, optimizer: KeyedOptimizer) -> list[tuple[str, KeyedOptimizer]]:
    if not isinstance(optimizer, CombinedOptimizer):
        return [(name, optimizer)]
    return [
        leaf
        for key, part in optimizer.optimizers
        for leaf in _leaves(CombinedOptimizer.prepend_opt_key(key, name), part)
    ]


def _keyed(parameters: dict[str, torch.Tensor], kind: str, lr: float) -> KeyedOptimizer:
    arguments = _table_arguments(kind, lr)
    return KeyedOptimizerWrapper(parameters, lambda given: REPLICATED_OPTIMIZERS[kind](given, **arguments))


def _dense(parameters: dict[str, torch.Tensor], config: OptimizerConfig) -> KeyedOptimizer:
    # One kernel for all parameters: many small tensors cost Python's time, not arithmetic's.
    # The decay is always named: torch's AdamW would take 0.01 for nothing.
    arguments: dict[str, Any] = {"lr": config.dense_lr, "weight_decay": config.dense_weight_decay, "fused": True}
    dense: KeyedOptimizer = KeyedOptimizerWrapper(
        parameters, lambda given: DENSE_OPTIMIZERS[config.dense](given, **arguments)
    )
    if config.clip_gradient_norm is not None:
        dense = GradientClippingOptimizer(dense, clipping=GradientClipping.NORM, max_gradient=config.clip_gradient_norm)
    return dense


def schedule(config: OptimizerConfig, total_steps: int) -> list[WarmupStage]:
    """Stages of the learning rate: a linear rise over the warm-up, then a linear fall to zero if so configured."""
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
