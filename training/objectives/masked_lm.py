"""Masked language modelling.

Axes: B batch, T tokens.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from core.errors import UserError
from core.hashing import stable_hash
from core.registry import register
from model.leaves import IGNORE
from model.output import Batch
from training.objectives.base import Objective, Sums, common, counted
from training.objectives.draws import uniform


@register(
    "objective",
    "masked_lm",
    paper="1810.04805",
    title="BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding",
)
class MaskedLM(Objective):
    """Tokens hidden at random, predicted from both sides (Devlin et al. 2019, 1810.04805).

    Of the chosen tokens, 80% become the mask id, 10% a random id, 10% stay. Which ones is a pure
    function of the seed and the sample's index, so it is the same at any number of ranks, and
    held-out masks are the same at every evaluation. Document ends are never chosen.

    Args:
        rate: the part of the tokens that is predicted.
        mask_id: the id that stands for a hidden token; null: the tokenizer's `end`, which is never
            hidden itself and elsewhere stands only where documents meet.
    """

    kind: ClassVar[Literal["language", "vision"]] = "language"

    def __init__(
        self,
        tokenizer: Any,
        seed: int = 0,
        vocab: int | None = None,
        *,
        rate: Annotated[float, Field(gt=0, lt=1)] = 0.15,
        mask_id: Annotated[int | None, Field(ge=0)] = None,
    ):
        if tokenizer is None:
            raise UserError("train.objective: masked_lm needs data with a tokenizer")
        self.ids, self.end = tokenizer.vocab_size, tokenizer.end
        self.mask_id = tokenizer.end if mask_id is None else mask_id
        size = vocab if vocab is not None else self.ids
        if self.mask_id >= size:
            raise UserError(
                f"train.objective.mask_id: {self.mask_id} is not below the vocabulary's {size}; "
                f"set model.vocab={self.mask_id + 1}"
            )
        self.rate, self.seed = rate, seed

    def prepare(self, batch: Batch, samples: Tensor) -> Batch:
        tokens_BT = batch["tokens"]
        length = tokens_BT.shape[1]
        chosen, way, other = (
            torch.from_numpy(uniform(stable_hash("masked_lm", self.seed, part), samples, length))
            for part in ("chosen", "way", "other")
        )
        hidden_BT = (chosen < self.rate) & (tokens_BT != self.end)
        if "targets" in batch:  # what fills up a short batch counts for nothing
            hidden_BT &= counted(batch["targets"])[:, None]
        random_BT = (other * self.ids).long()
        seen_BT = torch.where(way < 0.8, self.mask_id, torch.where(way < 0.9, random_BT, tokens_BT))
        return {
            **batch,
            "tokens": torch.where(hidden_BT, seen_BT, tokens_BT),
            "targets": torch.where(hidden_BT, tokens_BT, IGNORE),
        }

    def __call__(self, model: nn.Module, batch: Batch) -> Sums:
        output = model(batch)
        sums = common(self, output, batch)
        sums["loss"] = output.token_losses.sum()
        return sums
