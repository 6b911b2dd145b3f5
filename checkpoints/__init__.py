"""Checkpoints: transactional save and restore, resharding, retention, inspection.

`CheckpointStore` (`checkpoints.store`) is the way in; `checkpoints.inspect` reads checkpoints
without torch, so that listing them is instant.
"""
