"""Folders of images, loose or packed."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from core.errors import UserError
from core.registry import register
from data_pipeline.files import digest, missing, read_bytes
from data_pipeline.sources.base import Pixels, as_pixels
from data_pipeline.sources.choose import IMAGES


@register("source", "image_folder", title="images in a folder per class")
class ImageFolder:
    """Images below a folder whose immediate folder is their class; classes are sorted by name.

    A `.tar`, `.tar.gz` or `.tgz` of such a folder is read as well; it is held in memory packed.
    Loose files are known by name, size and time of change, a packed folder by its content.

    Args:
        path: the folder, or the packed folder.
    """

    def __init__(self, cache: Path | None = None, *, path: str):
        self.cache = cache
        self.path = Path(path).expanduser()

    @cached_property
    def members(self) -> dict[str, bytes]:
        """The images of a packed folder; empty for a loose one."""
        if self.path.is_dir():
            return {}
        try:
            with tarfile.open(self.path) as tar:
                return {
                    member.name: _content(tar, member)
                    for member in tar
                    if member.isfile() and _is_image(Path(member.name))
                }
        except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
            raise UserError(f"{self.path}: not a whole tar archive: {error}") from None

    @cached_property
    def names(self) -> list[str]:
        """The images' paths below the folder, in sorted order."""
        if not self.path.exists():
            raise missing(self.path)
        if self.path.is_dir():
            found = [p for p in self.path.rglob("*") if _is_image(p) and p.is_file()]
            names = [p.relative_to(self.path).as_posix() for p in found]
        else:
            names = list(self.members)
        if not names:
            raise UserError(f"{self.path}: there are no images in it")
        for name in names:
            if "/" not in name:
                raise UserError(
                    f"{self.path}: image {name} is in no class; put each image in a folder named "
                    f"after its class"
                )
        return sorted(names)

    def fingerprint(self) -> str:
        if not self.path.exists():
            raise missing(self.path)
        if not self.path.is_dir():
            return digest(self.path, self.cache)
        whole = hashlib.sha256()
        for name in self.names:
            state = (self.path / name).stat()
            whole.update(f"{name}:{state.st_size}:{state.st_mtime_ns}\n".encode())
        return whole.hexdigest()

    def classes(self) -> Sequence[str]:
        return sorted({_class_of(name) for name in self.names})

    def labels(self) -> npt.NDArray[np.int64]:
        number = {name: index for index, name in enumerate(self.classes())}
        return np.array([number[_class_of(name)] for name in self.names], dtype=np.int64)

    def read(self, index: int) -> Pixels:
        name = self.names[index]
        loose = self.path.is_dir()
        data = read_bytes(self.path / name) if loose else self.members[name]
        return decode_image(data, str(self.path / name))


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None  # it is a regular file
    return file.read()


def _class_of(name: str) -> str:
    return name.rsplit("/", 2)[-2]


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGES and not path.name.startswith("._")


def decode_image(data: bytes, name: str) -> Pixels:
    """The pixels of an encoded image; raises UserError naming the file if it is broken."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            return as_pixels(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        message = str(error).split("<_io", 1)[0].strip()
        raise UserError(
            f"{name}: not a whole image ({len(data)} bytes): {message}; replace or remove it"
        ) from None
