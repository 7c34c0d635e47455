"""What is fuzzed: every reader of something that another process or person wrote, with valid examples to damage.

A target takes bytes and must either accept them or raise a TrefoilError; what it accepts must hold up to use. Anything
else (another error, a hang, a wrong row) is a defect.
"""

from __future__ import annotations

from pathlib import Path

from tests.faults.targets.base import Target, WrongRow
from tests.faults.targets.logs import dataset_json, ingest_spec, log_file
from tests.faults.targets.runs import (
    checkpoint_index,
    checkpoint_manifest,
    checkpoint_state,
    journal_lines,
    registry_record,
    sent_state,
    unsharded_checkpoint,
)
from tests.faults.targets.serving import artifact_manifest, artifact_signature, delta, program, scorer_rows
from tests.faults.targets.settings import recipe_json, rollout_plan, sweep_space

__all__ = ["Target", "WrongRow", "make_targets"]


def make_targets(folder: Path, names: tuple[str, ...] | None = None) -> dict[str, Target]:
    """The targets, with their examples made in `folder`; only those of `names` if given."""
    made = {}
    for make in (
        dataset_json,
        log_file,
        recipe_json,
        sweep_space,
        rollout_plan,
        ingest_spec,
        artifact_manifest,
        artifact_signature,
        checkpoint_index,
        checkpoint_state,
        checkpoint_manifest,
        unsharded_checkpoint,
        delta,
        journal_lines,
        sent_state,
        registry_record,
        program,
        scorer_rows,
    ):
        if names is None or make.__name__ in names:
            made[make.__name__] = make(folder / make.__name__)
    return made
