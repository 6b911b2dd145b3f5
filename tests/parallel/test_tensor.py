"""Each leaf operation on two ranks against the same math on one process.

The functions named `…_on_a_rank` run on every rank of the pool.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from core.errors import UserError
from evaluation.contracts.ranks import Ranks
from parallel.tensor import DataOperations, TensorOperations


def operations(sequence_parallel: bool = False) -> TensorOperations:
    group = dist.group.WORLD
    assert group is not None
    return TensorOperations(group, None, sequence_parallel)


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def region_on_a_rank(sequence_parallel: bool) -> dict[str, Tensor]:
    """x → enter → own columns, a split norm, a gather, own rows → leave; and an alike branch."""
    ops = operations(sequence_parallel)
    x = noise(0, 2, 6, 4)
    if sequence_parallel:
        x = ops.shard_sequence(x).clone()
    x.requires_grad_()
    up, down, gate = noise(1, 4, 8), noise(2, 8, 4), noise(3, 4, 4)
    own_up = up.chunk(2, 1)[ops.rank].clone().requires_grad_()
    own_down = down.chunk(2, 0)[ops.rank].clone().requires_grad_()
    gate.requires_grad_()
    inside = ops.enter(x)
    h = inside @ own_up
    h = h / (ops.split_sum(h.square().sum(-1, keepdim=True)) + 1).sqrt()
    top = ops.split_max(h.amax(-1, keepdim=True))
    whole = ops.split_gather(h, -1)
    h = h * top + ops.split_slice(whole.flip(-1), -1)
    y = ops.leave(h @ own_down) + ops.leave_alike(torch.tanh(inside @ gate))
    weight = noise(4, 2, 6, 4)
    if sequence_parallel:
        weight = ops.shard_sequence(weight)
    auxiliary = ops.once((inside @ gate).square().mean((1, 2)))
    ((y * weight).sum() + auxiliary.sum()).backward()
    assert x.grad is not None and gate.grad is not None
    dist.all_reduce(gate.grad)  # inside, the gradient of what is alike is a partial sum
    grads = {"up": own_up.grad, "down": own_down.grad, "gate": gate.grad, "x": x.grad}
    return {"y": y.detach() + 0, **{k: v for k, v in grads.items() if v is not None}}


def region_on_one_process() -> dict[str, Tensor]:
    x, up, down, gate = (
        t.requires_grad_()
        for t in (noise(0, 2, 6, 4), noise(1, 4, 8), noise(2, 8, 4), noise(3, 4, 4))
    )
    h = x @ up
    h = h / (h.square().sum(-1, keepdim=True) + 1).sqrt()
    h = h * h.amax(-1, keepdim=True).detach() + h.flip(-1)
    y = h @ down + torch.tanh(x @ gate)
    loss = (y * noise(4, 2, 6, 4)).sum() + (x @ gate).square().mean((1, 2)).sum()
    loss.backward()
    return {"y": y.detach(), "up": up.grad, "down": down.grad, "gate": gate.grad, "x": x.grad}  # type: ignore[dict-item]


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_region(ranks: Ranks, sequence_parallel: bool) -> None:
    first, second = ranks.run(region_on_a_rank, sequence_parallel)
    wanted = region_on_one_process()
    got = {
        "up": torch.cat((first["up"], second["up"]), 1),
        "down": torch.cat((first["down"], second["down"]), 0),
        "gate": first["gate"],
    }
    for name in ("y", "x"):
        if sequence_parallel:
            got[name] = torch.cat((first[name], second[name]), 1)
        else:
            got[name] = first[name]
            torch.testing.assert_close(second[name], first[name])
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}")


def outside_on_a_rank() -> tuple[Tensor, Tensor]:
    """A norm over the tokens of the stream, under sequence parallelism."""
    ops = operations(sequence_parallel=True)
    x = ops.shard_sequence(noise(0, 2, 6, 4)).clone().requires_grad_()
    total = ops.sequence_sum(x.square().sum(1, keepdim=True))
    (x / total.sqrt() * ops.shard_sequence(noise(1, 2, 6, 4))).sum().backward()
    assert x.grad is not None
    return total.detach(), x.grad


def test_sums_over_tokens(ranks: Ranks) -> None:
    x = noise(0, 2, 6, 4).requires_grad_()
    total = x.square().sum(1, keepdim=True)
    (x / total.sqrt() * noise(1, 2, 6, 4)).sum().backward()
    answers = ranks.run(outside_on_a_rank)
    for found, _ in answers:
        torch.testing.assert_close(found, total.detach())
    torch.testing.assert_close(torch.cat([grad for _, grad in answers], 1), x.grad)


def vocabulary_on_a_rank(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ops = operations()
    own = (30 * noise(0, 7, 10)).to(dtype).chunk(2, 1)[ops.rank].clone().requires_grad_()
    targets = torch.tensor([0, 4, 5, 9, -100, 7, -100])
    losses = ops.cross_entropy(own, targets, -100)
    (losses * noise(1, 7)).sum().backward()
    assert own.grad is not None
    table = noise(2, 10, 3).chunk(2, 0)[ops.rank]
    rows = ops.leave(ops.embed(torch.tensor([[0, 9, 4, 5]]), table))
    return losses.detach(), own.grad, ops.gather_vocabulary(own).detach(), rows + 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_vocabulary(ranks: Ranks, dtype: torch.dtype) -> None:
    logits = (30 * noise(0, 7, 10)).to(dtype).requires_grad_()
    targets = torch.tensor([0, 4, 5, 9, -100, 7, -100])
    losses = F.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="none")
    (losses * noise(1, 7)).sum().backward()
    answers = ranks.run(vocabulary_on_a_rank, dtype)
    torch.testing.assert_close(torch.cat([grad for _, grad, _, _ in answers], 1), logits.grad)
    for found, _, whole, rows in answers:
        torch.testing.assert_close(found, losses.detach())
        assert torch.equal(whole, logits.detach())
        torch.testing.assert_close(rows, noise(2, 10, 3)[torch.tensor([[0, 9, 4, 5]])])


def pending_on_a_rank() -> tuple[bool, bool]:
    """Is the sum that leaves a sublayer still in flight, and right once it is read?"""
    ops = operations()
    y = torch.ones(2, 4, 8, requires_grad=True)
    left = ops.leave(y)
    in_flight = isinstance(left, AsyncCollectiveTensor) and not left.completed
    hidden = torch.zeros(2, 4, 8) + left
    hidden.sum().backward()
    assert y.grad is not None and bool((y.grad == 1).all())
    return in_flight, bool((hidden == 2).all())


def test_what_leaves_is_waited_for_when_it_is_read(ranks: Ranks) -> None:
    assert ranks.run(pending_on_a_rank) == [(True, True)] * 2


def gathered_parameter_on_a_rank() -> tuple[bool, Tensor]:
    """autograd keeps a parameter's first gradient as it is given, here a gather's."""
    parameter = nn.Parameter(torch.full((3,), 1.0 + dist.get_rank()))
    operations().split_gather(parameter, 0).sum().backward()
    assert parameter.grad is not None
    return isinstance(parameter.grad, AsyncCollectiveTensor), parameter.grad


def test_gradients_are_not_in_flight(ranks: Ranks) -> None:
    assert ranks.run(gathered_parameter_on_a_rank)[0][0] is False
    for _, gradient in ranks.run(gathered_parameter_on_a_rank):
        assert torch.equal(gradient, torch.full((3,), 2.0))


def chance_on_a_rank(sequence_parallel: bool) -> tuple[Tensor, Tensor]:
    ops = operations(sequence_parallel)
    torch.manual_seed(ops.rank if sequence_parallel else 0)
    return ops.alike_random((5,), torch.device("cpu")), torch.rand(5)


def test_randomness(ranks: Ranks) -> None:
    for sequence_parallel in (False, True):
        (first, own), (second, other) = ranks.run(chance_on_a_rank, sequence_parallel)
        assert torch.equal(first, second)
        assert torch.equal(own, other) != sequence_parallel


def odd_on_a_rank(operation: str) -> Any:
    getattr(operations(sequence_parallel=True), operation)(torch.ones(2, 7, 4))


@pytest.mark.parametrize("operation", ["leave", "shard_sequence", "leave_alike"])
def test_tokens_that_cannot_be_divided(ranks: Ranks, operation: str) -> None:
    with pytest.raises(UserError, match="7 tokens cannot be divided between 2 ranks"):
        ranks.run(odd_on_a_rank, operation)


def mean_on_a_rank() -> Tensor:
    return DataOperations(dist.group.WORLD).data_mean(torch.tensor([1.0 + 2 * dist.get_rank()]))


def test_means_over_the_data_axes(ranks: Ranks) -> None:
    assert ranks.run(mean_on_a_rank) == [torch.tensor([2.0])] * 2
