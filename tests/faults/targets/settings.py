"""What people write: recipes, search spaces, rollout plans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.faults.mutations import damage_json, damage_yaml
from tests.faults.targets.base import Target, WrongRow


def recipe_json(folder: Path) -> Target:
    """A run's config.json; nothing that it says is left unread, and it reads back as it was."""
    from pipeline.config import config_from_json, config_to_json
    from tests.train.runs import tiny_config

    seed = config_to_json(tiny_config())

    def run(data: bytes) -> None:
        config = config_from_json(data, source="fuzz.json")
        text = config_to_json(config)
        if config_to_json(config_from_json(text, source="again.json")) != text:
            raise WrongRow("a configuration reads back as another")
        if unread := _unread(json.loads(data), json.loads(text), ""):
            raise WrongRow(f"field {unread} is silently left out")

    return Target(name="recipe_json", seeds=(seed,), damage=damage_json, run=run, share=0.38)


def _unread(given: Any, kept: Any, place: str) -> str | None:
    if isinstance(given, dict) and isinstance(kept, dict):
        for name, value in given.items():
            if name not in kept:
                return f"{place}.{name}"
            if found := _unread(value, kept[name], f"{place}.{name}"):
                return found
    return None


def sweep_space(folder: Path) -> Target:
    from pipeline.sweep.space import read_space
    from tests.sweep.test_study import CONFIG, SPACE

    folder.mkdir(parents=True)

    def run(data: bytes) -> None:
        (folder / "space.yaml").write_bytes(data)
        read_space(folder / "space.yaml", CONFIG)

    return Target(name="sweep_space", seeds=(SPACE.encode(),), damage=damage_yaml, run=run, share=0.05)


def rollout_plan(folder: Path) -> Target:
    """A plan; what is accepted is written and read back as the same."""
    from pipeline.rollout.plan import plan_text, read_plan
    from tests.rollout.plans import plan

    folder.mkdir(parents=True)
    seed = plan_text(plan()).encode()

    def run(data: bytes) -> None:
        (folder / "plan.yaml").write_bytes(data)
        found = read_plan(folder / "plan.yaml")
        (folder / "again.yaml").write_text(plan_text(found), encoding="utf-8")
        if read_plan(folder / "again.yaml").digest != found.digest:
            raise WrongRow("a plan reads back as another")

    return Target(name="rollout_plan", seeds=(seed,), damage=damage_yaml, run=run, share=0.015)
