"""The command line, and everything that starts a run."""
