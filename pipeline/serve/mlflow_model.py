"""An artifact as a model in MLflow, written as code, so that loading it unpickles nothing."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import pyarrow as pa

from pipeline.errors import RegistryError
from pipeline.schema import REQUEST_ID, Level
from pipeline.serve.artifact import PARITY, ArtifactInfo, open_artifact
from pipeline.serve.example import made_up_requests
from pipeline.serve.signature import Signature
from pipeline.tracking import Tracker

if TYPE_CHECKING:
    from mlflow.models import ModelSignature
    from mlflow.types.schema import AnyType, Array, DataType

_CODE = Path(__file__).parent / "mlflow_code.py"
_ARTIFACT = "artifact"
_EXAMPLE_CANDIDATES, _EXAMPLE_HISTORY = (2, 1), (3, 2)


def log_artifact_model(tracker: Tracker, artifact: str | Path, *, to: str = "model", patience_s: float = 60.0) -> str:
    """Keep an artifact as a pyfunc model among a run's artifacts.

    Args:
        tracker: of the run.
        artifact: folder of the artifact, which is checked first.
        to: folder among the run's artifacts.
        patience_s: the longest wait for MLflow to take it.

    Returns:
        The model's address `runs:/RUN_ID/TO`, as `pipeline.rollout.registry.Registry.register` wants it.

    Raises:
        ArtifactError: the artifact is missing or damaged.
        RegistryError: MLflow has not taken the model in time; it is sent later all the same.
    """
    info = open_artifact(artifact)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        save_model(info, model)
        tracker.log_artifact(model, to=to)
        arrived = tracker.flush(patience_s=patience_s)
    if not arrived or tracker.run_id is None:
        raise RegistryError(
            f"MLflow has not taken the model of surface {info.surface!r} within {patience_s:g} s; it is kept and sent "
            "later: register it then"
        )
    return f"runs:/{tracker.run_id}/{to}"


def save_model(info: ArtifactInfo, path: Path) -> None:
    """Write the MLflow model folder of an artifact: its copy, the code that loads it, signature and example."""
    from mlflow import pyfunc

    pyfunc.save_model(
        path=str(path),
        python_model=str(_CODE),
        artifacts={_ARTIFACT: str(info.path)},
        signature=model_signature(info.signature),
        input_example=example_rows(info.signature),
        pip_requirements=[f"{name}=={version}" for name, version in info.manifest.versions.items()],
        metadata={
            "surface": info.surface,
            "digest": info.digest,
            "dtype": info.signature.dtype,
            "parity": info.read(PARITY)["tasks"],
        },
    )


def example_rows(signature: Signature) -> pd.DataFrame:
    """Flat rows that the artifact can score: three candidates of two requests."""
    history = [min(n, signature.history_length) for n in _EXAMPLE_HISTORY]
    table = made_up_requests(signature.schema, signature.surface, candidates=_EXAMPLE_CANDIDATES, history=history)
    counts = list(_EXAMPLE_CANDIDATES)
    owner = [r for r, n in enumerate(counts) for _ in range(n)]
    candidate = signature.columns(Level.CANDIDATE)
    columns = {
        name: table[name].combine_chunks().flatten() if name in candidate else table[name].take(pa.array(owner))
        for name in table.column_names
    }
    return pa.table(columns).to_pandas()


def model_signature(signature: Signature) -> ModelSignature:
    """MLflow's view of flat rows and of the result.

    MLflow lets no integer column hold a missing value and turns no integer into a double, so ids, which may be
    absent, are declared as of any type: the scorer checks them more closely than MLflow could.
    """
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, DataType, Schema, TensorSpec

    columns: list[ColSpec | TensorSpec] = [ColSpec(DataType.long, REQUEST_ID, required=False)]
    for level in Level:
        for name, of in signature.columns(level).items():
            flat = of.value_type if level is Level.CANDIDATE else of
            columns.append(ColSpec(_mlflow_type(flat), name))
    return ModelSignature(
        inputs=Schema(columns), outputs=Schema([ColSpec(DataType.float, task) for task in signature.tasks])
    )


def _mlflow_type(of: pa.DataType) -> DataType | Array | AnyType:
    from mlflow.types.schema import AnyType, Array, DataType

    if pa.types.is_list(of):
        element = of.value_type
        # JSON knows no narrower integers, and MLflow narrows none.
        return Array(DataType.double if pa.types.is_floating(element) else DataType.long)
    return DataType.double if pa.types.is_floating(of) else AnyType()
