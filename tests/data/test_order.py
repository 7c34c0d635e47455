"""The global order is a pure function of its settings, whole, and the same for every number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.order import Schedule, SurfaceOrder, natural_weights
from pipeline.errors import ConfigError

sizes = st.dictionaries(st.sampled_from(["hf", "sr", "rp"]), st.integers(0, 200), min_size=1)
weights = st.fixed_dictionaries({s: st.sampled_from([0.1, 0.5, 1.0, 3.0]) for s in ("hf", "sr", "rp")})


def spans(schedule: Schedule, surface: str) -> list[tuple[int, int]]:
    return [schedule.span(surface, step) for step in range(schedule.steps)]


def test_natural_shares_end_together_and_fill_each_batch() -> None:
    schedule = Schedule(sizes={"hf": 70, "sr": 20, "rp": 10}, requests_per_batch=10)
    assert schedule.steps == 10
    assert spans(schedule, "hf") == [(7 * k, 7 * k + 7) for k in range(10)]
    assert spans(schedule, "rp") == [(k, k + 1) for k in range(10)]


def test_explicit_weights_drop_out_goes_on_without_the_exhausted_surface() -> None:
    schedule = Schedule(sizes={"hf": 12, "sr": 3}, requests_per_batch=4, weights={"hf": 1, "sr": 1})
    assert schedule.steps == 6
    assert spans(schedule, "sr") == [(0, 2), (2, 3), (3, 3), (3, 3), (3, 3), (3, 3)]
    assert spans(schedule, "hf") == [(2 * k, 2 * k + 2) for k in range(6)]


def test_stop_ends_before_a_surface_runs_dry_and_repeat_starts_it_again() -> None:
    settings = {"sizes": {"hf": 12, "sr": 3}, "requests_per_batch": 4, "weights": {"hf": 1, "sr": 1}}
    stop = Schedule(**settings, exhaustion="stop")
    assert (stop.steps, spans(stop, "sr")) == (1, [(0, 2)])
    repeat = Schedule(**settings, exhaustion="repeat")
    assert repeat.steps == 6
    assert spans(repeat, "sr")[-1] == (10, 12)  # the fourth pass over its three requests


def test_stop_keeps_a_last_step_that_comes_out_even() -> None:
    schedule = Schedule(sizes={"hf": 12, "sr": 4}, requests_per_batch=4, weights={"hf": 1, "sr": 1}, exhaustion="stop")
    assert (schedule.steps, spans(schedule, "sr")) == (2, [(0, 2), (2, 4)])


@given(sizes=sizes, batch=st.integers(1, 64), shares=st.none() | weights)
def test_drop_out_gives_every_request_exactly_once(
    sizes: dict[str, int], batch: int, shares: dict[str, float] | None
) -> None:
    chosen = None if shares is None else {s: shares[s] for s in sizes}
    schedule = Schedule(sizes=sizes, requests_per_batch=batch, weights=chosen)
    for surface, size in sizes.items():
        given_to = [p for start, stop in spans(schedule, surface) for p in range(start, stop)]
        assert given_to == list(range(size))
    for step in range(schedule.steps):
        taken = sum(stop - start for start, stop in (schedule.span(s, step) for s in sizes))
        assert taken <= batch + len(sizes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"requests_per_batch": 0}, "requests_per_batch is 0"),
        ({"weights": {"hf": 1.0, "sr": -1.0}}, "surface weight of 'sr' is -1.0"),
        ({"weights": {"hf": 1.0}}, "surface weights lack sr"),
        ({"weights": {"hf": 1.0, "srr": 1.0}}, "did you mean 'sr'"),
    ],
)
def test_bad_schedules_name_the_knob(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Schedule(**{"sizes": {"hf": 1, "sr": 1}, "requests_per_batch": 2, **settings})  # type: ignore[arg-type]


def test_temperature_evens_out() -> None:
    assert natural_weights({"hf": 100, "rp": 4, "sr": 0}, 2.0) == {"hf": 10.0, "rp": 2.0}
    with pytest.raises(ConfigError, match="temperature is 0"):
        natural_weights({"hf": 1}, 0)


orders = st.builds(
    SurfaceOrder,
    surface=st.just("hf"),
    unit_rows=st.lists(st.integers(1, 40), min_size=1, max_size=6).map(tuple),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 2),
    lanes=st.integers(1, 8),
    window=st.integers(1, 20),
    shuffle=st.booleans(),
)


def rows_by_position(order: SurfaceOrder, world_size: int) -> dict[int, tuple[int, int]]:
    """Position -> (row group, row), put together from all ranks."""
    found: dict[int, tuple[int, int]] = {}
    for rank in range(world_size):
        for block in range(-(-order.size // (order.lanes * order.window))):
            positions, virtual = order.block_rows(block, rank, world_size)
            assert (np.diff(positions) > 0).all()
            units, rows = order.locate(virtual)
            for p, u, r in zip(positions.tolist(), units.tolist(), rows.tolist(), strict=True):
                assert p not in found
                found[p] = (u, r)
    return found


@given(order=orders, world_size=st.integers(1, 4))
def test_every_row_stands_at_one_position_whatever_the_ranks(order: SurfaceOrder, world_size: int) -> None:
    alone = rows_by_position(order, 1)
    assert sorted(alone) == list(range(order.size))
    assert sorted(alone.values()) == [(u, r) for u, n in enumerate(order.unit_rows) for r in range(n)]
    if world_size <= order.lanes:
        assert rows_by_position(order, world_size) == alone


@given(order=orders, world_size=st.integers(1, 4))
def test_ranks_share_evenly_when_they_divide_the_lanes(order: SurfaceOrder, world_size: int) -> None:
    if order.lanes % world_size:
        return
    counts = [
        sum(order.block_rows(b, rank, world_size)[0].size for b in range(-(-order.size // order.window)))
        for rank in range(world_size)
    ]
    assert max(counts) - min(counts) <= order.lanes // world_size


def test_order_changes_with_seed_epoch_and_surface_and_is_kept_without_shuffle() -> None:
    def rows(**settings: object) -> list[int]:
        base = {"surface": "hf", "unit_rows": (50, 50), "seed": 0, "epoch": 0, "lanes": 4, "window": 16}
        order = SurfaceOrder(**{**base, **settings})  # type: ignore[arg-type]
        return [order.window_rows(0, 0).tolist(), order.units.tolist()]

    assert rows() == rows()
    for other in ({"seed": 1}, {"epoch": 1}, {"surface": "sr"}, {"repeat": 1}):
        assert rows(**other) != rows()
    assert rows(shuffle=False) == [list(range(16)), [0, 1]]
