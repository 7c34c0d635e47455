"""How things are called in MLflow."""

from __future__ import annotations

from collections.abc import Mapping

MAX_PARAM = 6000  # characters that MLflow's stores take for one parameter value
KEY_TAG = "trefoil.key"  # our own name of a run, by which a resent run finds itself
PARENT_TAG = "mlflow.parentRunId"


def metric_name(surface: str, task: str, metric: str, *, split: str = "val") -> str:
    """The name of a metric.

    >>> metric_name("hf", "click", "auc")
    'val/hf/click/auc'
    """
    return f"{split}/{surface}/{task}/{metric}"


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
