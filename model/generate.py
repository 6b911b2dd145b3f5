"""Sampling from a language model. Axes: B batch, T tokens, V vocabulary."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from core.errors import UserError
from model.block import Block
from model.cache import Cache
from model.language import LanguageModel
from model.output import Batch


@torch.no_grad()
def generate(
    model: nn.Module,
    ids_BT: Tensor,
    steps: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    stop: Collection[int] = (),
    source: Tensor | None = None,
) -> Tensor:
    """The prompts ids_BT and up to `steps` tokens after each, B,T+steps or fewer.

    Keys and values are cached where every mixer of the model supports it (`can_cache`); otherwise
    each step computes the whole sequence again, with the same result. All prompts have one length.

    Args:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample from this many likeliest tokens.
        top_p: sample from the fewest tokens whose probability reaches this (Holtzman et al. 2019,
            1904.09751).
        generator: where the randomness comes from, on the device of the logits.
        stop: ids that end a row; what follows in it repeats the id. When all rows have ended,
            generation ends.
        source: BS, the source tokens of an encoder-decoder.

    Raises:
        UserError: if the prompt is empty, or the text would outgrow the model's max_length.
    """
    _check(model, ids_BT, steps)
    extra: Batch = {} if source is None else {"source": source}
    cache = Cache(ids_BT.shape[1] + steps) if can_cache(model) else None
    ended_B = torch.zeros(ids_BT.shape[0], dtype=torch.bool, device=ids_BT.device)
    stops = torch.tensor(sorted(stop), dtype=ids_BT.dtype, device=ids_BT.device)
    was_training = model.training
    model.eval()
    try:
        for _ in range(steps):
            held = 0 if cache is None else cache.length
            logits_BV = logits_at_last(model, {"tokens": ids_BT[:, held:], **extra}, cache)
            next_B = sample(logits_BV, temperature, top_k, top_p, generator).to(ids_BT.dtype)
            next_B = torch.where(ended_B, ids_BT[:, -1], next_B)
            ids_BT = torch.cat((ids_BT, next_B[:, None]), dim=1)
            ended_B = ended_B | torch.isin(next_B, stops)
            if bool(ended_B.all()):
                break
    finally:
        model.train(was_training)
    return ids_BT


def logits_at_last(model: nn.Module, batch: Batch, cache: Cache | None = None) -> Tensor:
    """The logits BV after the last token, over the whole vocabulary however the model is split."""
    output = model(batch) if cache is None else model(batch, cache)
    logits_BTV: Tensor = output.logits
    return logits_BTV[:, -1]


def can_cache(model: nn.Module) -> bool:
    """Whether the model decodes from a cache: all its mixers do, and nothing of it is elsewhere."""
    if not isinstance(model, LanguageModel) or not model.here:
        return False
    if model.axis.ops.sequence_parallel or model.axis.ops.context.size > 1:
        return False
    for block in model.stack.blocks:
        assert isinstance(block, Block)
        for name, sublayer in block.sublayers.items():
            # A feed-forward sees each token by itself unless it says otherwise.
            if not getattr(sublayer.branch, "caches", name == "feedforward"):
                return False
    return True


def sample(
    logits_BV: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One id per row; the arguments are those of `generate`."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    sorted_BV, ids_BV = (logits_BV.float() / temperature).sort(-1, descending=True)
    if top_k is not None:
        sorted_BV[:, top_k:] = -torch.inf
    if top_p is not None:
        share_BV = sorted_BV.softmax(-1)
        # A token stays if those before it have not reached top_p; the first always stays.
        before_BV = share_BV.cumsum(-1) - share_BV
        late_BV = before_BV >= top_p
        late_BV[:, 0] = False
        sorted_BV = sorted_BV.masked_fill(late_BV, -torch.inf)
    drawn_B1 = torch.multinomial(sorted_BV.softmax(-1), 1, generator=generator)
    return ids_BV.gather(1, drawn_B1)[:, 0]


def _check(model: nn.Module, ids_BT: Tensor, steps: int) -> None:
    if ids_BT.dim() != 2 or ids_BT.shape[1] == 0:
        raise UserError("generation starts from a prompt of at least one token")
    config = getattr(model, "config", None)
    if getattr(config, "architecture", None) == "encoder":
        raise UserError("an encoder sees both sides of every token, so it cannot generate")
    longest = getattr(config, "max_length", None)
    # The last token drawn is never read by the model.
    needed = ids_BT.shape[1] + steps - 1
    if isinstance(longest, int) and needed > longest:
        raise UserError(
            f"a prompt of {ids_BT.shape[1]} tokens and {steps} more outgrow the model's max_length "
            f"of {longest}; ask for at most {max(longest - ids_BT.shape[1] + 1, 0)}"
        )
