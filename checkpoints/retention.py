"""Which checkpoints to delete after a save."""

from __future__ import annotations

from collections.abc import Sequence

from checkpoints.found import Found


def prunable(newest_first: Sequence[Found], keep: int, keep_every: int = 0) -> list[Found]:
    """The checkpoints that the newest `keep` good ones make superfluous.

    Only good ones count, so a damaged checkpoint never pushes out one that can be loaded; a damaged
    one goes when it is older than all that are kept.

    Args:
        newest_first: every checkpoint, in reversed order of saving.
        keep: how many good ones stay; 0: all stay.
        keep_every: good ones whose step is a multiple of this stay as well; 0: none do.
    """
    if keep == 0:
        return []
    good, superfluous = 0, []
    for item in newest_first:
        if good >= keep:
            milestone = keep_every > 0 and item.step % keep_every == 0 and item.flaw is None
            if not milestone:
                superfluous.append(item)
        elif item.flaw is None:
            good += 1
    return superfluous
