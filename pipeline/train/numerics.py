"""How this process rounds, and whether it adds in the same order every time."""

from __future__ import annotations

import os
from typing import Any, cast

import torch

from pipeline.config import ComputeConfig


def set_numerics(compute: ComputeConfig, device: torch.device) -> None:
    """Set torch's switches for the whole process, as a run asks."""
    torch.backends.cuda.matmul.allow_tf32 = compute.tf32
    torch.backends.cudnn.allow_tf32 = compute.tf32
    if device.type == "cuda":
        # cuBLAS reads it when it is first used. FBGEMM sorts rows before it adds their gradients, whatever is set.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(compute.deterministic)
        # Memory that nobody reads before it is written would be filled first, at each allocation.
        cast(Any, torch.utils.deterministic).fill_uninitialized_memory = False
