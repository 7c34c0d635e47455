"""What benchmarks share: the one JSON object that each prints as its last line, and fair comparison."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Mapping
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


def interleaved(sides: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Results of each side, in rounds of one run each, so that a slow spell of the machine hits all sides."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            found[name].append(run())
    return found


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def ratio_interval(numerator: list[float], denominator: list[float]) -> list[float]:
    """Ends of the 95 % interval of `median_ratio` over rounds, by order statistics; five digits.

    Of five rounds or fewer it is their whole range, and of five holds the median with probability 1 - 2 / 2**5 = 94 %.
    """
    import numpy as np

    from pipeline.serve.measure import percentile_interval

    ends = percentile_interval(np.array(numerator) / np.array(denominator), 50)
    return [float(f"{end:.5g}") for end in ends]
