"""What a run was made with: the machine's kind and the version of every installed package."""

from __future__ import annotations

import os
import platform
from importlib.metadata import distributions
from typing import Any

import torch


def environment(device: torch.device) -> dict[str, Any]:
    """Python, platform, cores, the device and its libraries, and the versions of all packages, for a run's record.

    Args:
        device: that the first rank computes on.
    """
    on_cuda = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if on_cuda else platform.processor() or platform.machine(),
        "cuda": torch.version.cuda if on_cuda else None,
        "packages": dict(sorted((found.name, found.version) for found in distributions())),
    }
