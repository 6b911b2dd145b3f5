import numpy as np

from data_pipeline.augment import Flip, Shift
from data_pipeline.order import random_words

PIXELS = np.random.default_rng(0).integers(1, 256, (300, 5, 4, 3), dtype=np.uint8)
WORDS = random_words(0, np.arange(300))


def test_shift_is_one_of_all_shifts() -> None:
    out = Shift(pixels=1)(PIXELS, WORDS)
    padded = np.pad(PIXELS, ((0, 0), (1, 1), (1, 1), (0, 0)))
    seen = set()
    for image in range(300):
        places = [
            (r, c)
            for r in range(3)
            for c in range(3)
            if (out[image] == padded[image, r : r + 5, c : c + 4]).all()
        ]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) == 9


def test_flip_mirrors_about_half() -> None:
    out = Flip()(PIXELS, WORDS)
    flipped = np.array([(a == b[:, ::-1]).all() for a, b in zip(out, PIXELS, strict=True)])
    assert (out[~flipped] == PIXELS[~flipped]).all()
    assert 120 < flipped.sum() < 180
    assert (Flip(probability=1.0)(PIXELS, WORDS) == PIXELS[:, :, ::-1]).all()
    assert (Flip(probability=0.0)(PIXELS, WORDS) == PIXELS).all()


def test_an_image_is_changed_by_its_own_word_alone() -> None:
    for change in (Shift(pixels=2), Flip()):
        assert (change(PIXELS, WORDS)[7:9] == change(PIXELS[7:9], WORDS[7:9])).all()
