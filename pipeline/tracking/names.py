"""How things are called in MLflow."""

from __future__ import annotations

import getpass
import os
from collections.abc import Mapping

from pipeline.errors import DataError

MAX_PARAM = 6000  # characters that MLflow's stores take for one parameter value
KEY_TAG = "trefoil.key"  # our own name of a run, by which a resent run finds itself
PARENT_TAG = "mlflow.parentRunId"
JOB_TAG = "torchx_job"  # TorchX's handle of the job that a run is of, for `torchx status`, `log` and `tracker`
JOB_PARENT_TAG = "torchx_parent"  # the job, or whatever else has an id, that the launcher named as its parent
# Where TorchX tells a job the two.
JOB_VARIABLE, JOB_PARENT_VARIABLE = "TORCHX_JOB_ID", "TORCHX_PARENT_RUN_ID"


def metric_name(surface: str, task: str, metric: str, *, split: str = "val") -> str:
    """The name of a metric.

    >>> metric_name("hf", "click", "auc")
    'val/hf/click/auc'
    """
    return f"{split}/{surface}/{task}/{metric}"


def quoted(value: str) -> str:
    """As MLflow's filters take a text, which know no escapes.

    Raises:
        DataError: the text holds both kinds of quotes.
    """
    if "'" not in value:
        return f"'{value}'"
    if '"' not in value:
        return f'"{value}"'
    raise DataError(f"MLflow cannot search for {value!r}, which holds both kinds of quotes")


def flatten(params: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Nested parameters by dotted name, as MLflow stores them; values past its limit end in an ellipsis.

    >>> flatten({"optimizer": {"lr": 0.002}, "seed": 1})
    {'optimizer.lr': '0.002', 'seed': '1'}
    """
    flat: dict[str, str] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            text = str(value)
            flat[prefix + name] = text if len(text) <= MAX_PARAM else text[: MAX_PARAM - 1] + "…"
    return flat


def user_name() -> str:
    """Who runs this process, or the number of a user without a name, as in a container."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"user {os.getuid()}"
