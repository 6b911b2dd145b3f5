"""FSDP2 under a schedule of our own: parameters gathered once a step, gradients reduced once.

FSDP2 follows whole backward passes; a pipeline runs parts of several, in two halves even. So its
parameters stay gathered from their first use in a step, its gradients are summed up unreduced, and
what FSDP2 would do at the end of the last backward pass is done when the engine says so.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard


def keep_gathered(model: nn.Module) -> None:
    """Begin a step: nothing is let go, nothing reduced, until `reduce_gradients`."""
    assert isinstance(model, FSDPModule)
    model.set_reshard_after_forward(False)
    model.set_reshard_after_backward(False)
    model.set_requires_gradient_sync(False)
    model.set_is_last_backward(False)


def reduce_gradients(model: nn.Module) -> None:
    """End a step: every gradient is reduced to this rank's shard, every parameter let go."""
    assert isinstance(model, FSDPModule)
    model.set_reshard_after_backward(True)
    model.set_requires_gradient_sync(True)
    model.set_is_last_backward(True)
    root = fully_shard.state(model)  # type: ignore[attr-defined]
    for state in reversed(root._state_ctx.all_states):
        _reduce(state)
    root._root_post_backward_final_callback()


def reduce_blocks(part: nn.Module) -> None:
    """Reduce the gradients of the blocks of a part of the model, which this step is done with."""
    for block in _blocks(part):
        block.set_reshard_after_backward(True, recurse=False)
        block.set_requires_gradient_sync(True, recurse=False)
        _reduce(fully_shard.state(block))  # type: ignore[attr-defined]


def let_go(part: nn.Module) -> None:
    """Drop the gathered parameters of the blocks of a part of the model, or of the whole."""
    for block in _blocks(part):
        block.reshard()


def let_all_go(model: nn.Module) -> None:
    """Drop all gathered parameters; a forward pass without a backward pass leaves some.

    They would be read in place of the shards, whatever becomes of these.
    """
    let_go(model)
    if isinstance(model, FSDPModule):
        model.reshard()


def _blocks(part: nn.Module) -> list[FSDPModule]:
    return [m for m in part.modules() if isinstance(m, FSDPModule) and m is not part]


def _reduce(state: Any) -> None:
    for group in state._fsdp_param_groups:
        group.post_backward()
