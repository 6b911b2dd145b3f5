"""Writing a source as WebDataset shards; reading them back gives the same samples, bit for bit.

The same source always gives the same bytes of shards.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core.errors import UserError
from data_pipeline.config import WeightedSource
from data_pipeline.data import Kind, open_source
from data_pipeline.sources.base import ImageSource, TextSource
from data_pipeline.sources.shards import CLASS_NAMES


def pack(
    item: WeightedSource,
    kind: Kind,
    folder: Path,
    samples: int = 10_000,
    megabytes: float = 1000,
    cache: Path | None = None,
) -> list[Path]:
    """Write a source's samples as shards `shard-000000.tar`, … in a new folder.

    Args:
        item: the source.
        kind: "language" writes `.txt` members, "vision" `.png` and `.cls`, and `classes.txt`.
        folder: created whole or not at all.
        samples: most samples in a shard.
        megabytes: a shard that has reached this size is closed.
        cache: where the source may remember checksums.

    Raises:
        UserError: if the folder has files already or cannot be written, or the source is empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists already; name a new folder for the shards")
    source = open_source(item, kind, cache)
    rows = _text(source) if kind == "language" else _images(source)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
        try:
            names = _write(rows, temporary, samples, megabytes)
            if not names:
                raise UserError(f"source {item.name}: there is nothing in it to pack")
            if kind == "vision":
                listed = "".join(f"{name}\n" for name in source.classes())
                (temporary / CLASS_NAMES).write_text(listed, encoding="utf8")
            temporary.chmod(0o755)
            temporary.replace(folder)  # an empty folder may be there
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from None
    return [folder / name for name in names]


def _write(
    rows: Iterator[dict[str, bytes]], folder: Path, samples: int, megabytes: float
) -> list[str]:
    from webdataset import TarWriter

    names: list[str] = []
    writer: Any = None
    held = size = 0
    try:
        for number, row in enumerate(rows):
            if writer is None or held >= samples or size >= megabytes * 1e6:
                if writer is not None:
                    writer.close()
                names.append(f"shard-{len(names):06d}.tar")
                writer = TarWriter(str(folder / names[-1]), encoder=False, mtime=0)
                held = size = 0
            size += writer.write({"__key__": f"{number:09d}", **row})
            held += 1
    finally:
        if writer is not None:
            writer.close()
    return names


def _text(source: TextSource) -> Iterator[dict[str, bytes]]:
    for document in source.documents():
        yield {"txt": document.text.encode("utf8")}


def _images(source: ImageSource) -> Iterator[dict[str, bytes]]:
    from PIL import Image

    for index, label in enumerate(source.labels().tolist()):
        pixels = source.read(index)
        written = io.BytesIO()
        Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(written, "PNG")
        yield {"cls": str(label).encode(), "png": written.getvalue()}
