"""Learning-rate schedules: pure functions of the step, as a factor of the peak learning rate."""

from core.registry import export

export(__name__, globals())
