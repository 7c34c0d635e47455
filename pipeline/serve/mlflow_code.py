"""The code of every registered model: MLflow runs this file and nothing else, then loads the artifact beside it."""

from __future__ import annotations

from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

ARTIFACT = "artifact"


class ScorerModel(PythonModel):
    """A surface's artifact as a pyfunc model: flat or grouped rows in, one column of probabilities a task out."""

    def load_context(self, context: PythonModelContext) -> None:
        """Check and load the artifact; raises ArtifactError if it is not what was exported."""
        from pipeline.serve.scorer import Scorer

        self.scorer = Scorer.open(context.artifacts[ARTIFACT], warm_up=True)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Probabilities in the order of the rows. Raises DataError for rows that the artifact cannot read."""
        return self.scorer.score(model_input).to_pandas()


set_model(ScorerModel())
