"""The objective of a run: the config's, or what its model is for."""

from __future__ import annotations

from typing import Any

from torch import nn

from core.errors import UserError
from core.registry import build
from data_pipeline.data import Data
from model.language import LanguageModel
from training.objectives.base import Objective


def default_objective(model: nn.Module) -> str:
    """By the model: masked for encoders and for vision models that reconstruct."""
    config: Any = model.config
    if isinstance(model, LanguageModel):
        return "masked_lm" if config.architecture == "encoder" else "causal_lm"
    return "masked_image" if config.reconstruct else "image_classification"


def choose_objective(spec: Any, model: nn.Module, data: Data, seed: int) -> Objective:
    """Build the objective, given what model and data offer.

    Raises:
        UserError: if it cannot be learned by this model from this data.
    """
    config: Any = getattr(model, "config", None)
    objective: Objective = build(
        "objective",
        default_objective(model) if spec is None else spec,
        tokenizer=data.tokenizer,
        vocab=getattr(config, "vocab", None),
        patches=getattr(model, "patches", 0),
        seed=seed,
    )
    if objective.kind != data.kind:
        raise UserError(
            f"train.objective: this objective is for {objective.kind}, the data is {data.kind}"
        )
    return objective
