"""Starting a run from another recipe's checkpoint: what fits is taken, and all of it is told."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from torchrec.distributed.model_parallel import DistributedModelParallel

from pipeline.errors import CheckpointError, unknown
from pipeline.schema import DatasetSchema
from pipeline.train.checkpoint.files import UNSHARDED
from pipeline.train.checkpoint.reading import load_overlap, saved_tensor
from pipeline.train.checkpoint.shards import Reader
from pipeline.train.checkpoint.state import read_state
from pipeline.train.tables import table_of

_MODEL = "model."
Fate = Literal["taken", "grown", "new", "left behind"]


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """What became of one tensor.

    Args:
        name: of the table, or of the dense parameter.
        fate: taken whole; grown, its first rows taken; new, with first values; or left behind in the checkpoint.
        source, target: shapes in the checkpoint and in the run; None where it is not.
        is_table: whether it is an embedding table.
    """

    name: str
    fate: Fate
    source: tuple[int, ...] | None
    target: tuple[int, ...] | None
    is_table: bool


def warm_start(
    checkpoint: Path, model: DistributedModelParallel, schema: DatasetSchema, *, fresh: tuple[str, ...] = ()
) -> list[WarmStart]:
    """Take weights of another run's checkpoint into a sharded model; every rank calls this. No optimizer state.

    Tables are matched by name, wherever the model keeps them; dense parameters by their whole name.

    Args:
        checkpoint: folder of the other run's checkpoint.
        model: holds its first values.
        schema: of this run's log.
        fresh: names or patterns (user, body.towers.*) of what keeps its first values.

    Raises:
        CheckpointError: the checkpoint is damaged, a shape differs in more than rows of a table, ids mean other
            values, or `fresh` names nothing.
    """
    if checkpoint.suffix == UNSHARDED:
        raise CheckpointError(f"{checkpoint} is unsharded; give the folder of a checkpoint to --warm-start")
    state = read_state(checkpoint)
    metadata = Reader(str(checkpoint)).read_metadata()
    saved = {
        _label(n): (n, tuple(saved_tensor(metadata, n, checkpoint).size))
        for n in metadata.state_dict_metadata
        if n.startswith(_MODEL)
    }
    targets = {_label(f"{_MODEL}{n}"): value for n, value in model.state_dict().items()}
    _check_fresh(fresh, set(targets))
    report: list[WarmStart] = []
    problems: list[str] = []
    sources: dict[str, str] = {}
    for label, value in targets.items():
        size, is_table = tuple(value.size()), _is_table(label)
        source = saved.get(label)
        shape = source[1] if source is not None else None
        if source is None or any(fnmatchcase(_shown(label), pattern) for pattern in fresh):
            fate: Fate = "new"
        else:
            assert shape is not None, "a saved tensor has a shape"
            problem = _problem(label, shape, size, state.schema, schema)
            if problem:
                problems.append(problem)
            fate = "taken" if shape == size else "grown"
            sources[label] = source[0]
        report.append(WarmStart(name=_shown(label), fate=fate, source=shape, target=size, is_table=is_table))
    if problems:
        raise CheckpointError(
            f"{checkpoint} does not fit this run; name what shall keep its first values with --fresh NAME:\n  - "
            + "\n  - ".join(problems)
        )
    report += [
        WarmStart(name=_shown(label), fate="left behind", source=shape, target=None, is_table=_is_table(label))
        for label, (_, shape) in saved.items()
        if label not in targets
    ]
    load_overlap(checkpoint, {label: targets[label] for label in sources}, sources)
    return sorted(report, key=lambda r: (not r.is_table, r.name))


def _label(name: str) -> str:
    """What tensors are matched by: `table:NAME`, or the parameter's whole name."""
    table = table_of(name)
    return f"table:{table}" if table is not None else name.removeprefix(f"{_MODEL}model.")


def _is_table(label: str) -> bool:
    return label.startswith("table:")


def _shown(label: str) -> str:
    return label.removeprefix("table:")


def _check_fresh(fresh: tuple[str, ...], labels: set[str]) -> None:
    names = {_shown(label) for label in labels}
    for pattern in fresh:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise CheckpointError("--fresh: " + unknown("table or parameter", pattern, names))


def _problem(
    label: str, source: tuple[int, ...], target: tuple[int, ...], before: DatasetSchema, after: DatasetSchema
) -> str | None:
    """Why a tensor cannot be taken; None if it can."""
    name = _shown(label)
    if not _is_table(label):
        return None if source == target else f"{name}: shape {list(source)} in the checkpoint, {list(target)} here"
    old, new = before.vocabulary(name), after.vocabulary(name)
    if source[1:] != target[1:]:
        return f"table {name}: dimension {source[1]} in the checkpoint, {target[1]} here"
    if old.method != new.method:
        return f"table {name}: its ids are of method {old.method!r} in the checkpoint, {new.method!r} here"
    if source[0] > target[0]:
        return f"table {name}: {source[0]} rows in the checkpoint, only {target[0]} here"
    if source[0] != target[0] and new.method == "hash":
        return (
            f"table {name}: hashed to {source[0]} ids in the checkpoint, {target[0]} here: each id means another value"
        )
    return None
