"""What a schedule is: a pure function from the step's index to a factor of the peak rate.

Step 0 is the first. The warmup rises linearly and reaches the peak at step `warmup`; what follows
is the subclass's, as a function of the progress from 0 (the peak's first step) to 1 (after the
last step, so the last step itself still learns).
"""

from __future__ import annotations


class Schedule:
    """Factor of the peak learning rate at each step of a run of `steps`.

    A run no longer than its warmup, as a short trial of a long recipe is, ends within the warmup.
    """

    def __init__(self, steps: int, warmup: int, floor: float):
        self.steps, self.warmup, self.floor = steps, warmup, floor
        self.rest = max(1, steps - warmup)

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        progress = min(1.0, (step - self.warmup) / self.rest)
        return self.floor + (1.0 - self.floor) * self.after(progress)

    def after(self, progress: float) -> float:
        """The way from 1 to 0 after the warmup."""
        raise NotImplementedError
