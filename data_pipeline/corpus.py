"""The text that a tokenizer learns from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from data_pipeline.split import SplitText


class TrainingText:
    """The training side of all sources, one document after another; read again on each loop."""

    def __init__(self, sources: Sequence[SplitText]):
        self.sources = list(sources)

    @property
    def characters(self) -> int:
        """How much text there is."""
        return sum(source.plan.training_characters for source in self.sources)

    def __iter__(self) -> Iterator[str]:
        for source in self.sources:
            for training, _ in source.parts():
                if training:
                    yield training
