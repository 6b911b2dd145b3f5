"""What a run comes to."""

from __future__ import annotations

from dataclasses import dataclass, field

from training.failure import EXIT_STOPPED


@dataclass(frozen=True)
class Outcome:
    """How far a run came, and what was measured last."""

    step: int
    """Optimizer steps done."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The last logged record."""
    validation: dict[str, float] = field(default_factory=dict)
    """The last held-out evaluation: loss, bits_per_byte, accuracy."""
    stopped: str | None = None
    """The signal that stopped the run, which has saved; None: it ran to its end."""
    seconds: float = 0.0
    """Wall time of the whole run, over all its restarts."""

    @property
    def code(self) -> int:
        """The process's exit code."""
        return EXIT_STOPPED if self.stopped else 0
