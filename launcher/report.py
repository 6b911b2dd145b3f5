"""`manyforms report`: a run as one HTML page that needs nothing else."""

from __future__ import annotations

from pathlib import Path

from core.errors import UserError
from launcher.reports.page import page
from launcher.reports.run import read_run


def report(folder: Path, out: Path | None) -> Path:
    """Write the page; where it is.

    Args:
        folder: the run's.
        out: the file to write; None: report.html in the run's folder.

    Raises:
        UserError: there is no run in the folder, or the file cannot be written.
    """
    text = page(read_run(folder))
    target = out or folder / "report.html"
    try:
        target.write_text(text, encoding="utf8")
    except OSError as error:
        raise UserError(f"--out: {target}: cannot be written: {error.strerror or error}") from None
    return target
