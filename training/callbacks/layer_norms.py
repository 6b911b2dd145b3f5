"""How large the hidden state is behind every block: where a deep network blows up or fades.

Axes: B batch, T tokens, D width, L blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.block import Block
from model.stream import Stream
from training.callbacks.base import Callback, Loop


class LayerNorms(Callback):
    """Logs `residual/<block>/rms`: √(mean of hidden²) over all tokens, channels and ranks.

    On logged steps only: a reduction over each block's output, and one message of 2·L numbers.
    Every rank adds up what it holds; tokens that several ranks hold alike count several times
    above and below the line, so the quotient is right under every layout. What a ladder residual
    leaves pending, and states that a topology carries beside `hidden`, are not in it.

    Args:
        model: whole, before an engine prepares it; its blocks are found again by name.
    """

    def __init__(self, model: nn.Module):
        named = [name for name, module in model.named_modules() if isinstance(module, Block)]
        self._number = {name: index for index, name in enumerate(named)}
        self._on = False
        self._squares: dict[int, Tensor] = {}
        self._counts: dict[int, int] = {}
        self._hooks: list[Any] = []

    def start(self, trainer: Loop) -> None:
        for name, module in trainer.engine.model.named_modules():
            if name in self._number:
                hook = self._hook(self._number[name])
                self._hooks.append(module.register_forward_hook(hook))

    def _hook(self, number: int) -> Any:
        def look(block: nn.Module, inputs: Any, stream: Stream) -> None:
            if self._on:
                self._add(number, stream.hidden.detach())

        return look

    def _add(self, number: int, hidden_BTD: Tensor) -> None:
        square = torch.linalg.vector_norm(hidden_BTD, dtype=torch.float32).square()
        held = self._squares.get(number)
        self._squares[number] = square if held is None else held + square
        self._counts[number] = self._counts.get(number, 0) + hidden_BTD.numel()

    @contextmanager
    def around(self, trainer: Loop, logged: bool) -> Iterator[None]:
        self._on = logged
        try:
            yield
        finally:
            self._on = False
            self._squares, self._counts = {}, {}

    def measured(self, trainer: Loop) -> dict[str, Tensor]:
        self._on = False
        device = trainer.engine.device
        elements = [self._counts.get(number, 0) for number in range(len(self._number))]
        squares_L = torch.zeros(len(elements), device=device)
        if self._squares:
            held = torch.tensor(list(self._squares), device=device)
            squares_L[held] = torch.stack(list(self._squares.values()))
        counts_L = torch.tensor(elements, dtype=torch.float64, device=device)
        values_2L = torch.stack([squares_L.double(), counts_L])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(values_2L)
        rms_L = (values_2L[0] / values_2L[1].clamp(min=1)).sqrt()
        return {f"residual/{number}/rms": rms for number, rms in enumerate(rms_L)}

    def end(self, trainer: Loop, outcome: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
