"""The comparison is of the same model, and says no when ours is slow."""

import sys

import pytest
import torch

from benchmarks import overhead
from benchmarks.plain import Llama, PlainLoop, Shape

TINY = Shape(dim=16, depth=2, heads=4, kv_heads=2, hidden=24, vocab=32, length=8, batch=4)


def test_both_compute_the_same_and_take_turns():
    turns = overhead.measure(TINY, 2, 3, torch.device("cpu"))
    assert len(turns.ours) == len(turns.theirs) == 3
    assert min(turns.ours + turns.theirs) > 0
    assert turns.plain.step == 10


def test_other_weights_are_noticed(monkeypatch):
    monkeypatch.setattr(overhead, "copy_weights", lambda source, target: None)
    with pytest.raises(AssertionError):
        overhead.measure(TINY, 1, 1, torch.device("cpu"))


def test_the_hand_written_loop_learns():
    torch.manual_seed(0)
    tokens = (torch.arange(9)[None] + torch.randint(0, 32, (64, 1))) % 32
    loop = PlainLoop(TINY, Llama(TINY), tokens, steps=80, lr=1e-2)
    loop.run(80)
    assert loop.losses[-1] < 0.5 * loop.losses[0]


@pytest.mark.parametrize(("ours", "code"), [(1.0, 0), (1.1, 1)])
def test_the_exit_code(monkeypatch, capsys, ours, code):
    def measured(shape, turn, rounds, device):
        turns = overhead.Turns.__new__(overhead.Turns)
        turns.ours, turns.theirs = [ours] * 5, [1.0] * 5
        return turns

    monkeypatch.setattr(overhead, "measure", measured)
    monkeypatch.setattr(sys, "argv", ["overhead"])
    assert overhead.main() == code
    assert ("BELOW" in capsys.readouterr().out) == bool(code)
