import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.errors import UserError
from data_pipeline.sources.folder import ImageFolder


def test_folder_has_a_class_per_folder(pictures: Path) -> None:
    source = ImageFolder(path=str(pictures))
    assert source.classes() == ["cat", "dog"]
    assert source.labels().tolist() == [0] * 12 + [1] * 12
    expected = np.asarray(Image.open(pictures / "dog" / "13.png"))
    assert (source.read(13) == expected).all()


def test_packed_folder_is_the_folder(pictures: Path) -> None:
    packed = pictures.parent / "packed.tar.gz"
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(pictures, "deep/er")
    loose, tight = ImageFolder(path=str(pictures)), ImageFolder(path=str(packed))
    assert tight.classes() == loose.classes()
    assert (tight.labels() == loose.labels()).all()
    assert all((tight.read(i) == loose.read(i)).all() for i in range(24))


def test_grey_images_have_one_channel(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((3, 3), 9, np.uint8)).save(tmp_path / "a" / "x.png")
    assert ImageFolder(path=str(tmp_path)).read(0).shape == (3, 3, 1)


def test_fingerprint_follows_the_files(pictures: Path) -> None:
    before = ImageFolder(path=str(pictures)).fingerprint()
    (pictures / "cat" / "00.png").rename(pictures / "dog" / "00.png")
    assert ImageFolder(path=str(pictures)).fingerprint() != before


def test_mistakes(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder; did you mean 'pictures'"):
        ImageFolder(path=str(tmp_path / "picture")).fingerprint()
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="none: there are no images"):
        ImageFolder(path=str(tmp_path / "none")).labels()
    Image.new("L", (2, 2)).save(pictures / "stray.png")
    with pytest.raises(UserError, match=r"image stray\.png is in no class"):
        ImageFolder(path=str(pictures)).labels()


@pytest.mark.parametrize("keep", [0, 20, 120])
def test_a_broken_image_is_named(pictures: Path, keep: int) -> None:
    broken = pictures / "cat" / "03.png"
    broken.write_bytes(broken.read_bytes()[:keep])
    with pytest.raises(UserError, match=rf"03\.png: not a whole image \({keep} bytes\)"):
        ImageFolder(path=str(pictures)).read(3)


def test_a_truncated_archive_is_named(pictures: Path) -> None:
    packed = pictures.parent / "packed.tar.gz"
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(pictures, "p")
    packed.write_bytes(packed.read_bytes()[:-500])
    with pytest.raises(UserError, match=r"packed\.tar\.gz: not a whole tar archive"):
        ImageFolder(path=str(packed)).labels()
