"""Numbers and scales."""

import pytest

from launcher.reports.scale import Scale, binned, seconds, short, size, smooth, ticks


def test_numbers_for_people():
    values = (0, 0.00012, 0.25, 1.23456, 123.4, 4567.0, 45670.0, 4.567e6, 2e12, float("nan"))
    assert [short(v) for v in values] == [
        "0", "1.20e-04", "0.25", "1.235", "123", "4,567", "45.7k", "4.57M", "2T", "nan",
    ]  # fmt: skip
    assert [size(v) for v in (10, 1500, 2.5e9, 3e12)] == ["10 B", "1.5 KB", "2.5 GB", "3.0 TB"]
    lengths = (5e-5, 0.0123, 4.25, 125, 7500, 200000)
    assert [seconds(v) for v in lengths] == [
        "50 µs", "12.3 ms", "4.2 s", "2 min 5 s", "2 h 5 min", "2 d 7 h",
    ]  # fmt: skip


def test_ticks_are_round_and_within():
    assert ticks(0, 90) == [0, 20, 40, 60, 80]
    assert ticks(0.13, 0.47, 4) == pytest.approx([0.2, 0.3, 0.4])
    assert ticks(3, 3) == [3]


def test_scales_map_ends_to_ends_and_hold_values_in():
    linear = Scale(0, 10, 100, 200)
    assert [linear(v) for v in (0, 5, 10, 99)] == [100, 150, 200, 200]
    log = Scale(0.01, 100, 0, 4, log=True)
    assert [log(v) for v in (0.01, 1, 100)] == pytest.approx([0, 2, 4])
    assert Scale(3, 3, 0, 10)(3) == 5  # a single value stands in the middle
    assert Scale(0.5, 2, 0, 1, log=True).ticks() == pytest.approx([0.5, 1, 2])


def test_smoothing_starts_at_the_first_value_and_binning_keeps_the_mean():
    assert smooth([5.0, 5.0, 5.0], 10) == pytest.approx([5, 5, 5])
    assert smooth([0.0, 1.0], 2)[1] == pytest.approx(2 / 3)
    points = [(s, float(s)) for s in range(1, 1001)]
    few = binned(points, 10)
    assert len(few) == 10
    assert few[0] == (50.5, 50.5)
    assert binned(points[:5], 10) == [(float(s), float(s)) for s in range(1, 6)]
