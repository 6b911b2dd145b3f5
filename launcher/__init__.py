"""The command line, and everything that starts a run."""

import os

# Read when torch is imported. c10d would print a C++ stack trace for each connection that is lost
# with a rank, beside the one line that says which (`parallel/watchdog.py`).
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
