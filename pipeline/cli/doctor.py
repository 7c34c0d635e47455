"""trefoil doctor"""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from pipeline.cli.common import console, finish, parse

DESCRIPTION = """What works on this machine, what does not, and how to mend it.

Example:  trefoil doctor"""
PACKAGES = ("torch", "torchrec", "fbgemm-gpu", "mlflow", "pyarrow", "polars", "torchx-nightly")


@dataclass(frozen=True, kw_only=True)
class Args:
    json: bool = False
    """Print the result as JSON."""
    quiet: bool = False
    """Print nothing but errors, and with --json the result."""


def main(argv: list[str]) -> int:
    args = parse(Args, argv, verb="doctor", description=DESCRIPTION)
    out = console(args)
    found = {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}
    problems = [f"{name} is not installed; run `make setup`" for name, v in found.items() if v is None]
    notes: list[str] = []
    if not problems:
        problems, notes = _devices()
    for name, v in found.items():
        out.print(f"{name:15} {v or 'missing'}")
    for note in notes:
        out.print(f"note: {note}")
    for problem in problems:
        out.print(f"problem: {problem}")
    if not problems:
        out.print("all that training on this machine needs is here")
    finish({"versions": found, "notes": notes, "problems": problems}, args.json)
    return 1 if problems else 0


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices() -> tuple[list[str], list[str]]:
    """Problems and notes about devices and tools."""
    import torch
    import torch.distributed as dist

    problems, notes = [], []
    try:
        import fbgemm_gpu  # noqa: F401
    except (ImportError, OSError) as error:
        problems.append(f"fbgemm_gpu does not load ({error}); install the build that fits this torch: see README")
    if not dist.is_gloo_available():
        problems.append("torch has no gloo; install an official build")
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        notes.append(f"CUDA: {names}; training uses NCCL")
        if not dist.is_nccl_available():
            problems.append("CUDA is here and torch has no NCCL; install the CUDA build of torch")
    else:
        notes.append(f"no CUDA device: training runs on {os.cpu_count()} cores over gloo")
    if shutil.which("g++") is None:
        notes.append("no g++: artifacts cannot be compiled ahead of time (AOTInductor); everything else works")
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        notes.append(f"runs go to the MLflow server of MLFLOW_TRACKING_URI ({uri.split('@')[-1]})")
    return problems, notes
