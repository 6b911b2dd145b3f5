from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.config import parse
from core.errors import UserError
from data_pipeline.config import ValidationConfig
from data_pipeline.sources.base import Document
from data_pipeline.split import SplitText, split_labels


class Texts:
    def __init__(self, texts: list[str]):
        self.texts = texts

    def fingerprint(self) -> str:
        return repr(self.texts)

    def documents(self) -> Iterator[Document]:
        for number, text in enumerate(self.texts):
            yield Document(str(number), text)


def split(texts: list[str], by: str, fraction: float = 0.1, seed: int = 0) -> SplitText:
    how = parse(ValidationConfig, {"by": by, "fraction": fraction, "seed": seed})
    return SplitText(Texts(texts), "x", how)


def sides(texts: list[str], by: str, fraction: float = 0.1) -> tuple[list[str], list[str]]:
    parts = list(split(texts, by, fraction).parts())
    return [a for a, _ in parts if a], [b for _, b in parts if b]


@given(st.lists(st.text(min_size=1), min_size=2, unique=True), st.floats(0.01, 0.99))
def test_documents_are_divided_whole(texts: list[str], fraction: float) -> None:
    train, held = sides(texts, "document", fraction)
    assert train and held
    assert sorted(train + held) == sorted(texts)


def test_copies_fall_on_the_same_side_whatever_the_order() -> None:
    texts = [f"text {n % 30}" for n in range(90)]
    train, held = sides(texts, "document", 0.3)
    assert not set(train) & set(held)
    back = sides(texts[::-1], "document", 0.3)
    assert sorted(back[1]) == sorted(held)


def test_growing_the_data_moves_nothing_across() -> None:
    texts = [f"text {n}" for n in range(400)]
    before, after = sides(texts[:200], "document"), sides(texts, "document")
    assert set(before[0]) <= set(after[0]) and set(before[1]) <= set(after[1])
    assert len(after[1]) == pytest.approx(40, abs=15)


def test_another_seed_divides_otherwise() -> None:
    texts = [f"text {n}" for n in range(200)]
    first, again = (split(texts, "document").plan.cuts for _ in range(2))
    other = split(texts, "document", seed=1).plan.cuts
    assert (first == again).all() and (first != other).any()


@given(st.lists(st.text(), min_size=1), st.sampled_from([0.1, 0.05, 0.5, 0.999]))
def test_the_tail_is_the_end_of_the_text(texts: list[str], fraction: float) -> None:
    whole = "".join(texts)
    if len(whole) < 2:
        return
    train, held = sides(texts, "tail", fraction)
    assert "".join(train) + "".join(held) == whole
    assert abs(len("".join(held)) - fraction * len(whole)) <= 1


def test_ninety_percent_is_exactly_that() -> None:
    train, held = sides(["x" * 1_115_394], "tail", 0.1)
    assert (len(train[0]), len(held[0])) == (1_003_854, 111_540)


def test_auto_depends_on_how_many_documents_there_are() -> None:
    assert split([f"{n}" * 9 for n in range(20)], "auto").plan.how == "document"
    assert split([f"{n}" * 9 for n in range(19)], "auto").plan.how == "tail"


@pytest.mark.parametrize(
    ("texts", "by", "message"),
    [
        ([], "auto", "source x: there is no text"),
        (["", ""], "tail", "source x: there is no text"),
        (["one"], "document", "set data.validation.by=tail"),
        (["a"], "tail", "one character"),
    ],
)
def test_what_cannot_be_divided(texts: list[str], by: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        _ = split(texts, by).plan


@given(st.lists(st.integers(0, 4), min_size=10, max_size=200), st.floats(0.02, 0.9))
def test_every_class_gives_its_share(labels: list[int], fraction: float) -> None:
    array = np.array(labels)
    how = parse(ValidationConfig, {"fraction": fraction})
    train, held = split_labels(array, "print", how)
    assert sorted([*train, *held]) == list(range(len(labels)))
    for label in set(labels):
        count = labels.count(label)
        assert (array[train] == label).sum() > 0
        share = (array[held] == label).sum()
        assert share == min(max(round(fraction * count), 1), count - 1)
    again = split_labels(array, "print", how)
    assert (again[0] == train).all()


def test_one_image_per_class_cannot_be_divided() -> None:
    with pytest.raises(UserError, match="none can be held out"):
        split_labels(np.array([0, 1, 2]), "print", parse(ValidationConfig, {}))
