"""`manyforms generate`: continue a text."""

from __future__ import annotations

from pathlib import Path

import torch

from core.errors import UserError
from launcher.trained import Trained, load_trained
from model.generate import generate as sample
from model.language import LanguageConfig


def generate(
    place: Path,
    prompt: str,
    tokens: int | None = None,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> str:
    """The prompt and what the model writes after it.

    Args:
        place: a run's folder, or one checkpoint.
        prompt: empty: the start of a document.
        tokens: how many to add at most; None: as many as fit, up to 200.

    Raises:
        UserError: the model does not write text, or the prompt does not fit.
    """
    return continue_text(load_trained(place), prompt, tokens, temperature, top_k, top_p, seed)


def continue_text(
    trained: Trained,
    prompt: str,
    tokens: int | None = None,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> str:
    """`generate` with a model that is already loaded."""
    model = trained.config.model
    if not isinstance(model, LanguageConfig):
        raise UserError(f"{trained.folder}: a vision model writes no text; try manyforms eval")
    if model.architecture == "encoder_decoder":
        raise UserError(
            f"{trained.folder}: an encoder-decoder needs source tokens besides a prompt; call "
            f"model.generate.generate(model, ids, steps, source=...) from Python"
        )
    tokenizer = trained.tokenizer
    ids = tokenizer.encode(prompt) or [tokenizer.end]
    assert isinstance(model.max_length, int)
    if tokens is None:
        tokens = max(min(200, model.max_length - len(ids) + 1), 1)
    device = trained.engine.device
    out = sample(
        trained.engine.model,
        torch.tensor([ids], device=device),
        tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=torch.Generator(device).manual_seed(seed),
        stop=[tokenizer.end],
    )
    return prompt + tokenizer.decode(out[0, len(ids) :].tolist())
