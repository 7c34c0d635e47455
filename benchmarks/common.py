"""What benchmarks share: the one JSON object that each prints as its last line."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any


class Report:
    """`{"benchmark", "commit", "machine", "settings", "figures"}`.

    Args:
        name: of the benchmark.
        settings: a dataclass or mapping of what was asked for.
    """

    def __init__(self, name: str, settings: Any) -> None:
        self.name = name
        self.settings = asdict(settings) if is_dataclass(settings) and not isinstance(settings, type) else settings

    def finish(self, figures: Mapping[str, Any]) -> None:
        """Print the object on one line."""
        report = {
            "benchmark": self.name,
            "commit": _commit(),
            "machine": machine(),
            "settings": self.settings,
            "figures": figures,
        }
        print(json.dumps(report, default=str), flush=True)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    model = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"cpu": model, "cores": os.cpu_count(), "gpu": device, "torch": torch.__version__}


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
