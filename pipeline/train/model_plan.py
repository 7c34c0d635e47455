"""What fixes a model's shape: a run's configuration and its log's schema, for training, export and plans alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from pipeline.config import RunConfig
from pipeline.data.layout import FeatureLayout, feature_layout
from pipeline.errors import ConfigError, unknown
from pipeline.schema import DatasetSchema, Level

# Each of the first two is held by a test that fails when a new version can do it (tests/train/test_build.py).
NOT_MANAGED = (
    "on CPU FBGEMM 1.8 cannot reset the rows that are evicted (fbgemm::reset_weight_momentum); no checkpoint holds the "
    "ids that TorchRec 1.8 has seen since the last eviction, so that a resumed run would learn something else; and "
    "artifacts have no place for a map of ids. Ingest the vocabulary by index, its table growing from day to day, "
    "or by hash"
)

Moments = Mapping[str, tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """Everything that fixes a model's shape; a trained run keeps it, so that export can build the same.

    Args:
        config: of the run.
        schema: of its log.
        moments: mean and standard deviation of each numeric feature on the training days.
        keep: surfaces of the model to build; all of the run's for training, one for an artifact.
    """

    config: RunConfig
    schema: DatasetSchema
    moments: Moments
    keep: tuple[str, ...]

    @property
    def trained_layout(self) -> FeatureLayout:
        """Layout of the whole model."""
        return feature_layout(self.schema, surfaces=self.config.surfaces, tasks=self.config.tasks, exclude=self.exclude)

    @property
    def exclude(self) -> tuple[str, ...]:
        """Features left out; without a history block, the history too."""
        names = list(self.config.exclude)
        if self.config.model.history.kind == "none":
            names += [f.name for f in self.schema.select(level=Level.HISTORY) if f.name not in names]
        return tuple(names)

    @property
    def layout(self) -> FeatureLayout:
        """Layout of the kept surfaces: the keys of features that none of them has are gone, numeric columns stay."""
        full = self.trained_layout

        def kept(names: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(n for n in names if set(self.schema.feature(n).surfaces) & set(self.keep))

        return replace(
            full,
            surfaces=self.keep,
            request_bags=kept(full.request_bags),
            candidate_bags=kept(full.candidate_bags),
            request_sequences=kept(full.request_sequences),
            candidate_sequences=kept(full.candidate_sequences),
        )


def model_plan(config: RunConfig, schema: DatasetSchema, moments: Moments) -> ModelPlan:
    """The plan of a whole model.

    Raises:
        ConfigError: table_dims names a table that no feature uses, or one that sequences share; ids names a table that
            no feature uses, or a way to find rows that is not the log's.
        SchemaError: the run names a surface, task or feature that the log does not have.
    """
    plan = ModelPlan(config=config, schema=schema, moments=moments, keep=config.surfaces)
    layout = plan.layout
    pooled = {layout.vocabularies[n] for n in layout.request_bags + layout.candidate_bags}
    for table in config.model.table_dims:
        if table not in pooled:
            raise ConfigError("model.table_dims: " + unknown("pooled table", table, pooled))
    _check_ids(plan)
    return plan


def _check_ids(plan: ModelPlan) -> None:
    tables, problems = set(plan.layout.vocabularies.values()), []
    for table, method in plan.config.model.ids.items():
        if table not in tables:
            problems.append(unknown("table", table, tables))
        elif method == "managed":
            problems.append(f"table {table!r} cannot be managed: {NOT_MANAGED}")
        elif (found := plan.schema.vocabulary(table).method) != method:
            problems.append(
                f"table {table!r} shall find its rows by {method!r}, and the log's ids are of method {found!r}; ingest "
                f"it with `method: {method}`, or write {found!r} in the recipe"
            )
    if problems:
        raise ConfigError("model.ids:\n  - " + "\n  - ".join(problems))
