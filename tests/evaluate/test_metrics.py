from __future__ import annotations

import numpy as np
import pytest
import torch
from torchrec.metrics.ne import compute_ne, get_ne_states

from pipeline.evaluate.metrics import ETA, METRICS, deciles, evaluate, named, task_metrics
from pipeline.evaluate.predictions import Predictions
from tests.evaluate.rows import table, task_rows


def test_values_by_hand() -> None:
    """Two clicks at .8 and .4, two misses at .4 and .2: of four pairs three are right and one is a tie."""
    metrics = task_metrics(task_rows([1, 1, 0, 0], [0.8, 0.4, 0.4, 0.2], user_id=[5, 5, 6, 7]))
    entropy = -(np.log(0.8) + np.log(0.4) + np.log(0.6) + np.log(0.8)) / 4
    assert metrics["auc"] == pytest.approx(3.5 / 4)
    assert metrics["log_loss"] == pytest.approx(entropy)
    assert metrics["ne"] == pytest.approx(entropy / np.log(2))
    assert metrics["calibration"] == pytest.approx(1.8 / 2)
    # Three distinct scores, each a decile: misses by .2, by |.4 - .5|, and by .2.
    assert metrics["ece"] == pytest.approx((0.2 + 2 * 0.1 + 0.2) / 4)
    assert (metrics.rows, metrics.positives, metrics.users) == (4, 2, 3)


def test_weights_count_as_repeated_rows() -> None:
    weighted = task_metrics(task_rows([1, 0, 1, 0], [0.7, 0.3, 0.2, 0.4], weight=[2, 1, 1, 3]))
    repeated = task_metrics(task_rows([1, 1, 0, 1, 0, 0, 0], [0.7, 0.7, 0.3, 0.2, 0.4, 0.4, 0.4]))
    assert {m: weighted[m] for m in METRICS} == pytest.approx({m: repeated[m] for m in METRICS})


def test_ne_is_that_of_torchrec() -> None:
    rng = np.random.default_rng(0)
    label, p, weight = (rng.random(500) < 0.1).astype(float), rng.random(500), rng.random(500)
    p[:3] = [0.0, 1.0, 1e-15]  # where the clipping speaks
    label[:3] = [1.0, 0.0, 1.0]
    states = get_ne_states(*(torch.from_numpy(x)[None] for x in (label, p, weight)), eta=ETA)
    theirs = compute_ne(
        states["cross_entropy_sum"], states["weighted_num_samples"], states["pos_labels"], states["neg_labels"], ETA
    )
    assert task_metrics(task_rows(label, p, weight))["ne"] == pytest.approx(theirs.item(), rel=1e-12)


@pytest.mark.parametrize(
    ("label", "missing", "why"),
    [
        ([0, 0], {"auc", "ne", "calibration"}, "all observed outcomes are negative"),
        ([1, 1], {"auc", "ne"}, "all observed outcomes are positive"),
        ([0.5, 1], {"auc"}, "labels are not all 0 or 1"),
        ([], set(METRICS), "no row with weight"),
    ],
)
def test_what_rows_cannot_define_is_none_with_a_reason(label: list[float], missing: set[str], why: str) -> None:
    metrics = task_metrics(task_rows(label, np.full(len(label), 0.4)))
    assert {m for m in METRICS if metrics[m] is None} == missing == set(metrics.reasons)
    assert all(why in reason for reason in metrics.reasons.values())


def test_always_the_mean_has_ne_one_and_right_calibration() -> None:
    metrics = task_metrics(task_rows([1, 0, 0, 0], [0.25] * 4))
    assert (metrics["ne"], metrics["calibration"], metrics["auc"]) == pytest.approx((1.0, 1.0, 0.5))
    assert metrics["ece"] == pytest.approx(0.0)


def test_deciles_hold_a_tenth_each_and_keep_equal_scores_together() -> None:
    curve = deciles(task_rows(np.arange(100) % 2, np.arange(100) / 100))
    assert curve.weight.tolist() == [10.0] * 10
    assert curve.mean_p == pytest.approx(np.arange(10) / 10 + 0.045)
    assert curve.mean_label.tolist() == [0.5] * 10
    assert curve.effective.tolist() == [10.0] * 10
    whole = deciles(task_rows([0, 1] * 50, [0.5] * 100, weight=[3, 1] * 50))
    # 200 in weight, of which 100 rows of 3 and 1 tell as much as 200^2 / (50 * 9 + 50) = 80 rows.
    assert (whole.weight.tolist(), whole.effective.tolist()) == ([200.0], [80.0])


def test_evaluate_goes_by_surface_and_task() -> None:
    both = table(
        surface=["hf", "hf", "sr", "sr"],
        label_click=[0.0, 1.0, 1.0, 0.0],
        label_like=[None, None, 1.0, 0.0],
        p_like=[0.5, 0.5, 0.9, 0.1],
    )
    metrics = evaluate(Predictions.of(both))
    assert metrics["hf"]["click"]["auc"] == 1.0
    assert metrics["sr"]["click"]["auc"] == 0.0
    assert metrics["sr"]["like"]["auc"] == 1.0
    assert metrics["hf"]["like"].rows == 0
    assert metrics["hf"]["like"]["auc"] is None
    flat = named(metrics)
    assert flat["val/sr/like/auc"] == 1.0
    assert "val/hf/like/auc" not in flat
