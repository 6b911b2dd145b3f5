"""The checkpoints of a folder, as they are found on disk."""

from __future__ import annotations

from pathlib import Path

from checkpoints.files import step_folders
from checkpoints.manifest import DamagedError, Manifest, flaw, read


class Found:
    """A checkpoint on disk, judged without reading its tensors.

    Attributes:
        step: from the folder's name.
        path: the folder.
        manifest: None where it cannot be read.
        flaw: why it cannot be used, as far as names and sizes tell; None: nothing seen.
    """

    def __init__(self, step: int, path: Path):
        self.step, self.path = step, path
        self.manifest: Manifest | None = None
        self.flaw: str | None = None
        try:
            self.manifest = read(path)
            self.flaw = flaw(path, self.manifest, bytes_too=False)
        except DamagedError as damage:
            self.flaw = str(damage)

    def verify(self, share: tuple[int, int] = (0, 1)) -> str | None:
        """Why it cannot be used, after reading every byte of the share; None: it is whole."""
        if self.flaw is not None or self.manifest is None:
            return self.flaw
        return flaw(self.path, self.manifest, share=share)

    @property
    def order(self) -> tuple[float, int]:
        """Newest is greatest; one whose age cannot be told counts as newest, to be reported."""
        return (self.manifest.sequence if self.manifest else float("inf"), self.step)


def scan(folder: Path) -> list[Found]:
    """Every checkpoint in a checkpoints folder, newest first.

    Newest means saved last: after a return to an older step that is not the order of steps.
    """
    found = [Found(step, path) for step, path in step_folders(folder).items()]
    return sorted(found, key=lambda item: item.order, reverse=True)
