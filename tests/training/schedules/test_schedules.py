"""Schedules at their key points."""

import itertools
import math

import pytest

from core.errors import UserError
from core.registry import build, names


def schedule(name: str, steps: int = 100, **options):
    return build("schedule", {"name": name, **options}, steps=steps)


@pytest.mark.parametrize("name", names("schedule"))
def test_warmup_is_linear_and_never_zero(name):
    factor = schedule(name, warmup=9)
    assert [factor(s) for s in range(10)] == pytest.approx([(s + 1) / 10 for s in range(10)])


@pytest.mark.parametrize("name", names("schedule"))
def test_never_rises_after_the_warmup(name):
    factor = schedule(name, warmup=5)
    values = [factor(s) for s in range(5, 120)]
    assert values[0] == pytest.approx(1.0)
    assert all(a >= b for a, b in itertools.pairwise(values))


def test_cosine_key_points():
    factor = schedule("cosine", floor=0.1)
    assert factor(0) == 1.0
    assert factor(50) == pytest.approx(0.55)
    assert factor(25) == pytest.approx(0.1 + 0.9 * (0.5 + math.sqrt(0.5) / 2))
    assert factor(100) == factor(1000) == pytest.approx(0.1)


def test_linear_key_points():
    factor = schedule("linear", warmup=20)
    assert factor(60) == pytest.approx(0.5)
    assert factor(100) == 0.0


def test_wsd_is_flat_and_then_decays():
    linear = schedule("wsd", warmup=10, decay=0.2)
    root = schedule("wsd", warmup=10, decay=0.2, form="sqrt", floor=0.1)
    assert {linear(s) for s in range(10, 81)} == {1.0}
    assert linear(90) == pytest.approx(0.5)
    assert linear(100) == pytest.approx(0.0)
    assert root(85) == pytest.approx(0.1 + 0.9 * (1 - math.sqrt(0.25)))


def test_wsd_decay_longer_than_what_is_left_starts_after_the_warmup():
    factor = schedule("wsd", warmup=50, decay=0.9)
    assert factor(50) == 1.0
    assert factor(75) == pytest.approx(0.5)


def test_warmup_longer_than_the_run_is_the_users_mistake():
    with pytest.raises(UserError, match=r"train\.schedule\.warmup: 100 steps"):
        schedule("constant", warmup=100)
