"""The direction of the imports: a room of the house imports only from rooms below it.

Every module is parsed, not run, so an import inside a function or under TYPE_CHECKING counts like one at the top.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("components", "pipeline", "torchx_specs")

# From the ground up. Rooms of one floor may import each other's modules only where they are the same room.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("components", "torchx_specs"),
    ("pipeline.errors", "pipeline.texts", "pipeline.progress"),
    ("pipeline.schema",),
    ("pipeline.config", "pipeline.tracking"),
    ("pipeline.evaluate",),
    ("pipeline.data",),
    ("pipeline.recipes", "pipeline.sweep"),
    ("pipeline.train",),
    ("pipeline.serve",),
    ("pipeline.rollout",),
    ("pipeline.publish", "pipeline.torchx_tracker"),
    ("pipeline.job",),
    ("pipeline.daily",),
    ("pipeline.rollout.driver",),
    ("pipeline.cli",),
)
DISTRIBUTING = ("torch.distributed", "torchrec.distributed")
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# Who may import what distributes, and why. Everything else is written for one device.
MAY_DISTRIBUTE = {
    # the one place that distributes
    "pipeline.train.sharding": DISTRIBUTING,
    # set up what it distributes with; none of them joins a group or talks to another rank
    "pipeline.train.constraints": ("torchrec.distributed",),
    "pipeline.train.planner": ("torchrec.distributed.planner", "torchrec.distributed.types"),
    "pipeline.train.cluster": ("torchrec.distributed.planner",),
    "pipeline.train.storage": ("torchrec.distributed.planner",),
    "pipeline.train.optimizers": ("torch.distributed.optim", "torchrec.distributed.model_parallel"),
    # the pipeline that overlaps the exchange of ids with training
    "pipeline.train.pipelining": ("torchrec.distributed.train_pipeline", "torchrec.distributed.types"),
    # save and load shards of the model that sharding made
    "pipeline.train.checkpoint.files": ("torch.distributed.checkpoint",),
    "pipeline.train.checkpoint.shards": ("torch.distributed.checkpoint",),
    "pipeline.train.checkpoint.writer": ("torch.distributed.checkpoint", "torchrec.distributed.model_parallel"),
    "pipeline.train.checkpoint.reading": (
        "torch.distributed.checkpoint",
        "torch.distributed._shard.sharded_tensor",
        "torchrec.distributed.model_parallel",
    ),
    "pipeline.train.checkpoint.warm": ("torchrec.distributed.model_parallel",),
    # fills each rank's shards of a table with the rows that an unsharded table has
    "pipeline.train.tables": ("torch.distributed._shard.sharded_tensor",),
    # asks which backends this build of torch has; joins nothing
    "pipeline.cli.doctor": ("torch.distributed",),
}
# What a room must not import from outside the house.
FORBIDDEN = {
    "components": ("mlflow", "torchrec.distributed", "torch.distributed", "torchx", "pyarrow", "polars", "pandas"),
    "pipeline.config": ("torch", "mlflow"),
    "pipeline.errors": ("torch", "mlflow"),
    "pipeline.schema": ("torch", "mlflow"),
    "pipeline.data": ("mlflow",),
    "pipeline.evaluate": ("mlflow", "torchrec"),
    "pipeline.recipes": ("torch", "mlflow"),
}


@dataclass(frozen=True)
class Import:
    """One import.

    Args:
        importer: module that imports.
        target: module, or module and name, that is imported.
        line: in the importer's file.
    """

    importer: str
    target: str
    line: int

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target}"


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def imports_of(module: str, source: str, *, is_package: bool) -> Iterator[Import]:
    """Every import in a source text; of `from a import b` both `a` and `a.b`, as b may be a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*up, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(module, f"{base}.{alias.name}", node.lineno)


def all_imports() -> list[Import]:
    found: list[Import] = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            module = ".".join(parts[:-1] if is_package else parts)
            found += imports_of(module, path.read_text(), is_package=is_package)
    return found


def room_of(module: str) -> str | None:
    """The room that a module of ours lies in; None for `pipeline` itself and for modules that are not ours."""
    # A room within a room, such as the rollout's driver, is its own.
    return max((room for room in FLOOR_OF if within(module, room)), key=len, default=None)


def problems(imports: list[Import]) -> list[str]:
    """What breaks the contract, one line each."""
    found: list[str] = []
    for item in imports:
        room, target = room_of(item.importer), room_of(item.target)
        if room is None:
            if item.importer != "pipeline":
                found.append(f"{item.importer} lies in no room: add it to FLOORS")
            continue
        if target is not None and target != room:
            if room in ("components", "torchx_specs"):
                found.append(f"{item}: {room} imports nothing else of ours")
            elif target == "torchx_specs":
                found.append(f"{item}: nothing imports torchx_specs")
            elif FLOOR_OF[target] >= FLOOR_OF[room]:
                found.append(f"{item}: {target} is not below {room}")
        if any(within(item.target, name) for name in FORBIDDEN.get(room, ())):
            found.append(f"{item}: {room} does without it")
        if room == "torchx_specs" and item.target.split(".")[0] not in {*sys.stdlib_module_names, "torchx", room}:
            found.append(f"{item}: torchx_specs imports torchx alone")
        if any(within(item.target, name) for name in DISTRIBUTING):
            allowed = MAY_DISTRIBUTE.get(item.importer, ())
            if not any(within(item.target, name) for name in allowed):
                found.append(f"{item}: only pipeline.train.sharding distributes, see MAY_DISTRIBUTE")
    return sorted(set(found))


def test_imports_only_go_down() -> None:
    assert problems(all_imports()) == []


def test_every_exception_is_still_needed() -> None:
    imports = all_imports()
    unused = [
        module
        for module, names in MAY_DISTRIBUTE.items()
        if not any(i.importer == module and within(i.target, name) for i in imports for name in names)
    ]
    assert unused == []


@pytest.mark.parametrize(
    ("module", "source", "problem"),
    [
        ("pipeline.data.batch", "from pipeline.train.build import build_task", "pipeline.train is not below"),
        ("pipeline.data.batch", "def f():\n    import pipeline.cli", "pipeline.data.batch:2 imports pipeline.cli"),
        ("pipeline.data.batch", "from pipeline import train", "pipeline.train is not below pipeline.data"),
        ("pipeline.data.batch", "from ..serve import scorer", "pipeline.serve is not below pipeline.data"),
        ("pipeline.config", "from pipeline.tracking import Tracker", "pipeline.tracking is not below"),
        ("pipeline.serve.export", "import torch.distributed as dist", "only pipeline.train.sharding distributes"),
        ("pipeline.train.trainer", "from torch import distributed", "only pipeline.train.sharding distributes"),
        ("pipeline.data.batch", "import torchx_specs.train", "nothing imports torchx_specs"),
        ("pipeline.fresh", "import os", "pipeline.fresh lies in no room"),
        ("components.mlp", "from pipeline.schema import Task", "components imports nothing else of ours"),
        ("components.mlp", "import mlflow", "components does without it"),
        ("components.mlp", "from torchrec.distributed import comm", "components does without it"),
        ("torchx_specs.train", "import torch", "torchx_specs imports torchx alone"),
        ("torchx_specs.train", "from pipeline.cli import main", "torchx_specs imports nothing else of ours"),
    ],
)
def test_a_planted_violation_is_caught(module: str, source: str, problem: str) -> None:
    found = problems(list(imports_of(module, source, is_package=False)))
    assert any(problem in line for line in found), found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pipeline.serve.export", "from pipeline.data.batch import Batch\nfrom pipeline.serve import scorer"),
        ("pipeline.train.checkpoint.writer", "import torch.distributed.checkpoint as dcp"),
        ("pipeline.data.batch", "from components.inputs import ModelInputs\nfrom . import order"),
        ("torchx_specs.train", "import re\nfrom torchx import specs\nfrom torchx_specs.launch import ranks"),
    ],
)
def test_a_right_import_is_let_through(module: str, source: str) -> None:
    assert problems(list(imports_of(module, source, is_package=False))) == []


HEAVY = ("torch", "torchrec", "mlflow", "polars", "pandas", "sklearn", "pyarrow")


@pytest.mark.parametrize(
    "statement",
    [
        "import pipeline.cli",
        "from pipeline.cli import main; main(['--help'])",
        "import pipeline.config, pipeline.recipes",
    ],
)
def test_help_does_not_wait_for_heavy_packages(statement: str) -> None:
    script = f"import sys; {statement}; sys.exit(', '.join(n for n in {HEAVY} if n in sys.modules) or None)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, f"imports {done.stderr}"
