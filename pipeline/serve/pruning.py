"""What an artifact leaves away of the unified model: parameters, bytes, and work for one request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from pipeline.data.block import RequestBlock
from pipeline.serve.example import made_up_requests
from pipeline.serve.program import ServingModel
from pipeline.serve.rows import to_requests
from pipeline.serve.scorer import Scorer
from pipeline.serve.signature import Signature
from pipeline.serve.trained import TrainedModel
from pipeline.train.tables import table_of

CANDIDATES = 64  # of the request whose work is counted


def table_shapes(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Rows and dimension of every table."""
    return {t: (p.shape[0], p.shape[1]) for n, p in module.named_parameters() if (t := table_of(n)) is not None}


def pruning(
    trained: TrainedModel,
    served: ServingModel,
    shapes: dict[str, tuple[int, int]],
    scorer: Scorer,
    *,
    program_bytes: int,
) -> dict[str, object]:
    """The unified model beside the artifact, and what only the former has.

    Args:
        trained: the unified model.
        served: what the artifact computes.
        shapes: of the artifact's tables.
        scorer: of the artifact.
        program_bytes: size of the exported program.
    """
    unified, signature = trained.task, scorer.signature
    tables = table_shapes(unified)
    dense = {n.removeprefix("model.body."): p for n, p in unified.named_parameters() if table_of(n) is None}
    kept = dict(served.body.named_parameters())
    values = sum(p.numel() for p in unified.parameters())
    dense_served = sum(p.numel() for p in kept.values())
    block, shape = _request(signature)
    inputs, tensors = trained.inputs(signature.surface, block), signature.tensors.tensors(block)
    return {
        "request": shape,
        "unified": {
            "tables": tables,
            "dense_parameters": sum(p.numel() for p in dense.values()),
            "parameters": values,
            "bytes": 4 * values,
            "flops": flops(lambda: unified.model(inputs)),
        },
        "artifact": {
            "tables": shapes,
            "dense_parameters": dense_served,
            "parameters": dense_served + sum(rows * dim for rows, dim in shapes.values()),
            "bytes": served.tables.bytes + 4 * dense_served,
            "table_bytes": served.tables.bytes,
            "table_bytes_fp32": sum(4 * rows * dim for rows, dim in shapes.values()),
            "program_bytes": program_bytes,
            "flops": flops(lambda: served(tensors)),
        },
        "dropped_tables": sorted(set(tables) - set(shapes)),
        "dropped_parameters": sorted(set(dense) - set(kept)),
    }


def flops(run: Callable[[], object]) -> int:
    """Floating-point operations of a call: matrix products and attention, as torch's counter has them."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={attention: _attention}) as counter, torch.inference_mode():
        run()
    return int(counter.get_total_flops())


def _attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _request(signature: Signature) -> tuple[RequestBlock, dict[str, int]]:
    table = made_up_requests(
        signature.schema, signature.surface, candidates=[CANDIDATES], history=[signature.history_length]
    )
    shape = {"requests": 1, "candidates": CANDIDATES, "history": signature.history_length}
    return to_requests(table, signature, "one request").block, shape
