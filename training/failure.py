"""How a run ends when it does not end by itself."""

EXIT_FAILED = 1
"""The exit code of a run that failed."""
EXIT_STOPPED = 75
"""The exit code of a run that a signal stopped after saving; schedulers requeue on it."""


class RunFailure(Exception):
    """A run that cannot go on: one line that names the rank, the step and the cause."""
