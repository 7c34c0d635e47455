"""The rivals on KuaiRand with the values that `benchmarks.tuning` chose, one search and budget for all.

`kuairand_tuned.yaml` holds the values, as `python -m benchmarks.tuning --write` has left them; everything else is that
of the recipe which was searched. Rivals that are not there were not searched.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.config import RunConfig, with_fields
from pipeline.evaluate.boosted_trees import BoostedTreesConfig
from pipeline.recipes import kuairand as recipes
from pipeline.recipes.kuairand import Recipe
from pipeline.texts import parse_yaml

VALUES = Path(__file__).with_suffix(".yaml")
BOOSTED_TREES = "boosted_trees"
# Rival -> its models: one, or one of each surface.
RIVALS: dict[str, tuple[Recipe, ...]] = {
    "unified": (recipes.kuairand,),
    "separate": (recipes.separate_hf, recipes.separate_sr, recipes.separate_rp),
    "merged": (recipes.merged,),
    **{name: (recipes.PARTS[name],) for name in ("mmoe", "ple", "shared_bottom", "star")},
    "din": (recipes.din,),
    BOOSTED_TREES: (recipes.kuairand,),
}


def tuned(values: dict[str, dict[str, dict[str, Any]]]) -> dict[str, tuple[Recipe, ...]]:
    """Arms `tuned_<rival>` of the rivals that were searched.

    Args:
        values: rival -> name of the model -> field -> value.

    Raises:
        ConfigError: a field that recipes do not have, or a value that it cannot take.
    """

    def changed(recipe: Recipe, fields: dict[str, Any]) -> Recipe:
        config: RunConfig = with_fields(recipe(), fields, source=VALUES.name)
        return lambda: config

    return {
        f"tuned_{rival}": tuple(
            recipe if rival == BOOSTED_TREES else changed(recipe, models[recipe().name]) for recipe in RIVALS[rival]
        )
        for rival, models in values.items()
    }


_VALUES: dict[str, dict[str, dict[str, Any]]] = parse_yaml(VALUES.read_bytes())
TUNED = tuned(_VALUES)
# Settings of the arms of `TUNED` that are boosted trees.
TUNED_TREES = {
    f"tuned_{BOOSTED_TREES}": BoostedTreesConfig(**fields) for fields in _VALUES.get(BOOSTED_TREES, {}).values()
}
