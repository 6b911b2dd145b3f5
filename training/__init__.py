"""The one loop, and what it is made of: optimizers, schedules, objectives, callbacks.

`Trainer` (in `training.trainer`) is the way in; nothing here imports torch before it is used.
"""

from core.registry import load_from
from training.failure import EXIT_FAILED, EXIT_STOPPED, RunFailure

load_from("optimizer", "training.optimizers")
load_from("schedule", "training.schedules")
load_from("objective", "training.objectives")

__all__ = ["EXIT_FAILED", "EXIT_STOPPED", "RunFailure", "TrainConfig", "Trainer"]


def __getattr__(name: str) -> object:
    if name == "Trainer":
        from training.trainer import Trainer

        return Trainer
    if name == "TrainConfig":
        from training.config import TrainConfig

        return TrainConfig
    raise AttributeError(f"module 'training' has no attribute '{name}'")
