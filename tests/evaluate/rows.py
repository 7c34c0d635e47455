"""Small predictions for the tests of evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from pipeline.evaluate.predictions import Predictions, TaskRows


def task_rows(label: Any, p: Any, weight: Any = None, user_id: Any = None) -> TaskRows:
    """Rows of one task; weight 1 and one user a row where not given."""
    label = np.asarray(label, dtype=np.float64)
    return TaskRows(
        label=label,
        p=np.asarray(p, dtype=np.float64),
        weight=np.ones(label.size) if weight is None else np.asarray(weight, dtype=np.float64),
        user_id=np.arange(label.size) if user_id is None else np.asarray(user_id),
    )


def table(rows: int = 4, **columns: Any) -> pl.DataFrame:
    """A table of the predictions contract: one request a row on `hf`, columns replaced or added by keyword."""
    base = {
        "surface": ["hf"] * rows,
        "date": ["2026-01-31"] * rows,
        "request_id": np.arange(rows),
        "user_id": np.arange(rows),
        "timestamp_ms": np.arange(rows),
        "candidate": np.zeros(rows, dtype=np.int32),
        "weight": np.ones(rows, dtype=np.float32),
        "label_click": np.arange(rows) % 2.0,
        "p_click": np.linspace(0.1, 0.9, rows),
    }
    return pl.DataFrame(base | columns)


def simulated(
    *, seed: int = 0, noise: float = 0.0, users: int = 150, rows: int = 3000, surfaces: tuple[str, ...] = ("hf", "sr")
) -> Predictions:
    """Clicks drawn from known probabilities; the scores see their logit through `noise`, drawn from `seed`.

    The clicks, users and surfaces are the same for every seed and noise.
    """
    world = np.random.default_rng(7)
    user = world.integers(users, size=rows)
    logit = -2 + world.normal(size=rows) + world.normal(size=users)[user]
    truth = 1 / (1 + np.exp(-logit))
    seen = 1 / (1 + np.exp(-(logit + noise * np.random.default_rng(seed).normal(size=rows))))
    return Predictions.of(
        table(
            rows,
            surface=np.array(surfaces)[world.integers(len(surfaces), size=rows)],
            user_id=user,
            label_click=(world.random(rows) < truth).astype(np.float32),
            p_click=seen,
            truth_click=truth,
            item_id=world.integers(40, size=rows),
        )
    )
