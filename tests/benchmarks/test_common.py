"""Ratios of benchmarks and their intervals, by hand."""

from __future__ import annotations

from benchmarks.common import median_ratio, ratio_interval


def test_a_ratio_is_the_median_over_rounds_with_its_interval_by_order_statistics() -> None:
    five = [2.0, 9.0, 4.0, 12.0, 5.0], [1.0, 3.0, 2.0, 3.0, 1.0]
    assert median_ratio(*five) == 3.0
    assert ratio_interval(*five) == [2.0, 5.0]  # the range: so few rounds say no more
    # 20 rounds: 10 -+ 1.96 * sqrt(20 / 4), outwards, of ordered ratios 1 to 20: the 6th to the 16th.
    twenty = [float(i) for i in range(20, 0, -1)], [1.0] * 20
    assert median_ratio(*twenty) == 10.5
    assert ratio_interval(*twenty) == [6.0, 16.0]
