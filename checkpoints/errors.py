"""What goes wrong with checkpoints, in two kinds.

`core.errors.UserError` is for what the user can put right by typing something else: a folder that
cannot be written, a step that does not exist, a checkpoint of another model. `CheckpointError` is
for a run that failed through no fault of the command: the disk is full, a file is damaged, a rank
died while saving. The command line ends with exit code 2 for the first and 1 for the second.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from core.errors import UserError

_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
_FULL = (errno.ENOSPC, errno.EDQUOT)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; what was already on disk is untouched."""


def explain(error: BaseException, doing: str, folder: Path) -> UserError | CheckpointError:
    """The error to raise for a failure under `folder` while `doing` ("saving step 100")."""
    if isinstance(error, UserError | CheckpointError):
        return error
    cause = os_error(error)
    if cause is not None and cause.errno in _FULL:
        return CheckpointError(
            f"{folder}: {doing}: {os.strerror(cause.errno)}; the checkpoints already there are "
            f"untouched; free space, or lower checkpoint.keep, and resume"
        )
    if cause is not None and cause.errno in _UNWRITABLE:
        return UserError(
            f"{folder}: {doing}: cannot write there ({os.strerror(cause.errno)}); choose another "
            f"folder or change its permissions"
        )
    reason = " ".join(str(cause or error).split()) or type(error).__name__
    return CheckpointError(f"{folder}: {doing}: {reason}")


def os_error(error: BaseException) -> OSError | None:
    """The system's error behind an exception: itself, or the nearest in its chain of causes."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno is not None:
            return seen
        seen = seen.__cause__ or seen.__context__
    return None
