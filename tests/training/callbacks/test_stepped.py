"""What lives by steps: drawn as a function of seed and step, added to whole parameters."""

from types import SimpleNamespace

import torch
from torch import nn

from training.callbacks.stepped import Stepped


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen, self.bias = [], nn.Parameter(torch.zeros(3), requires_grad=False)

    def begin_step(self, seed, step):
        self.seen.append((seed, step))

    def end_step(self):
        return {"bias": torch.tensor([1.0, -1.0, 0.0])}


def test_begins_before_and_ends_after_every_step():
    """Breaks if a resumed run begins at step 0, or a step is begun twice."""
    part = Part()
    engine = SimpleNamespace(model=nn.Sequential(part), add=lambda p, change: p.add_(change))
    trainer = SimpleNamespace(engine=engine, step=5)
    stepped = Stepped(seed=7)
    stepped.start(trainer)
    for _ in range(2):
        trainer.step += 1
        stepped.step(trainer, None)
    assert part.seen == [(7, 5), (7, 6), (7, 7)]
    assert part.bias.tolist() == [2.0, -2.0, 0.0]
