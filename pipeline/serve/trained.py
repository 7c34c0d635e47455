"""The trainer's side of parity: a whole trained model, unsharded and eager, fed by the loader's own code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from components.inputs import ModelInputs
from pipeline.data.assemble import assemble_inputs
from pipeline.data.block import RequestBlock, block_from_arrow, columns_of
from pipeline.data.logs import arrow_schema
from pipeline.train import checkpoint as checkpoints
from pipeline.train.checkpoint import CheckpointState

_REQUESTS = 256  # in one run


class TrainedModel:
    """The unified model of a checkpoint, on this device, evaluated.

    Args:
        checkpoint: its folder.
        state: of the checkpoint.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """

    def __init__(self, checkpoint: Path, state: CheckpointState) -> None:
        self.plan = state.plan
        self.task = checkpoints.load_task(checkpoint, self.plan).eval()

    def inputs(self, surface: str, block: RequestBlock) -> ModelInputs:
        """What the model eats when all requests are of one surface."""
        schema, layout = self.plan.schema, self.plan.layout
        blocks = {}
        for name in self.plan.keep:
            columns = columns_of(schema, name, layout.features, ())
            blocks[name] = block_from_arrow(arrow_schema(schema, name).empty_table().select(columns), schema)
        return assemble_inputs(blocks | {surface: block}, layout)

    def scores(self, surface: str, block: RequestBlock) -> np.ndarray:
        """Calibrated probabilities of requests of one surface, float32 [C, T]."""
        parts = [torch.empty(0, len(self.plan.config.tasks))]
        with torch.inference_mode():
            for start in range(0, len(block), _REQUESTS):
                inputs = self.inputs(surface, block.slice(start, start + _REQUESTS))
                parts.append(torch.sigmoid(self.task.model(inputs).calibrated))
        return torch.cat(parts).numpy()
