"""Saving and restoring as a transaction, at any topology."""
