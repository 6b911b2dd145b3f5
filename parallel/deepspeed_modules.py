"""Blocks and the model as DeepSpeed can hook them: with tensors at their borders.

ZeRO-3 gathers a module's parameters before it runs, forward and backward, and learns of the
backward pass from the tensors that enter and leave the module. It does not look into a stream or a
model's output, so those travel past its hooks as tuples of tensors.
"""

from __future__ import annotations

from typing import Any

import torch.utils._pytree as pytree
from torch import nn

from model.output import Batch, ModelOutput
from parallel.recompute import blocks


class _Bordered:
    """A block whose calls pass its hooks as tensors; callers still give it streams."""

    border: Any  # how to put the last tensors that passed back together
    watched: bool

    def __call__(self, stream: Any) -> Any:
        tensors, self.border = pytree.tree_flatten(stream)
        passed = super().__call__(*tensors)  # type: ignore[misc]
        return pytree.tree_unflatten(list(passed), self.border)

    def register_forward_hook(self, hook: Any, **options: Any) -> Any:
        """Hooks made after DeepSpeed's own see the stream that the block returns."""
        if not self.watched:
            return super().register_forward_hook(hook, **options)  # type: ignore[misc]

        def look(module: nn.Module, inputs: Any, passed: Any) -> Any:
            stream = pytree.tree_unflatten(list(passed), self.border)
            changed = hook(module, inputs, stream)
            return None if changed is None else tuple(pytree.tree_leaves(changed))

        return super().register_forward_hook(look, **options)  # type: ignore[misc]


def gather_whole_blocks(model: nn.Module) -> None:
    """Make each block a unit of ZeRO-3: gathered, released and reduced as one."""
    from deepspeed.utils import set_z3_leaf_module

    for block in blocks(model):
        kind = type(block)
        inner = block.forward
        block.__class__ = type(f"Bordered{kind.__name__}", (_Bordered, kind), {"watched": False})
        block.forward = _tensors_only(block, inner)  # type: ignore[method-assign]
        set_z3_leaf_module(block, True)


def _tensors_only(block: Any, inner: Any) -> Any:
    def forward(*tensors: Any) -> tuple[Any, ...]:
        stream = inner(pytree.tree_unflatten(list(tensors), block.border))
        passed, block.border = pytree.tree_flatten(stream)
        return tuple(passed)

    return forward


def show_streams(model: nn.Module) -> None:
    """From here on, hooks on blocks are not DeepSpeed's."""
    for block in blocks(model):
        if isinstance(block, _Bordered):
            block.watched = True


class Entry(nn.Module):
    """What DeepSpeed is given as the model: it returns its output's tensors.

    beside: a module that only tells DeepSpeed something by being there.
    """

    def __init__(self, model: nn.Module, beside: nn.Module | None):
        super().__init__()
        self.model, self.beside = model, beside
        self.border: Any = None

    def forward(self, batch: Batch, *more: Any) -> tuple[Any, ...]:
        passed, self.border = pytree.tree_flatten(vars(self.model(batch, *more)))
        return tuple(passed)


class Runs(nn.Module):
    """What losses are given as the model: DeepSpeed's engine around `Entry`, with whole outputs."""

    engine: Any
    entry: Entry

    def __init__(self, engine: Any, entry: Entry):
        super().__init__()
        self.__dict__ |= {"engine": engine, "entry": entry}  # owned elsewhere

    def forward(self, batch: Batch, *more: Any) -> ModelOutput:
        passed = self.engine(batch, *more)
        return ModelOutput(**pytree.tree_unflatten(list(passed), self.entry.border))
