"""Expert parallelism against one process: uneven, empty and lopsided loads, drops, the overlap.

The functions named `…_on_a_rank` run on every rank of the pool.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from checkpoints.store import CheckpointStore
from evaluation.contracts.distributed import write
from evaluation.contracts.parity import compare, filled
from evaluation.contracts.ranks import Ranks
from model.experts import Experts
from model.feedforwards.moe import MoE
from model.init import initialise
from parallel.expert import ExpertDispatch
from parallel.tensor import DataOperations, bind
from tests.parallel.test_parity import batch, config

TOLERANCE = 1e-5
EXPERTS, DIM = 6, 4


@pytest.fixture(scope="module")
def three_ranks() -> Iterator[Ranks]:
    pool = Ranks(3)
    yield pool
    pool.close()


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def divide(module: Any, lazy: bool = True) -> None:
    """Leave a rank its own experts of a module and the journey to the others."""
    group = dist.group.WORLD
    assert group is not None
    operations = DataOperations(None)
    operations.dispatch = ExpertDispatch(group, lazy)
    bind(module, operations)
    banks = module if isinstance(module, Experts) else module.experts
    for bank in (banks.gate, banks.up, banks.down):
        if bank is not None:
            own = bank.weight.detach().chunk(group.size())[group.rank()]
            bank.weight = torch.nn.Parameter(own.clone())


def sent(case: str, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """x_ND, chosen_Nk and weights_Nk of a rank."""
    tokens = {"uneven": 5 + 3 * rank, "empty": 7 * (rank != 1)}.get(case, 6)
    generator = torch.Generator().manual_seed(rank)
    chosen_Nk = torch.rand(tokens, EXPERTS, generator=generator).argsort(-1)[:, :2]
    if case == "one takes all":
        chosen_Nk = torch.full_like(chosen_Nk, 4)
    elif case == "some get none":
        chosen_Nk = chosen_Nk % 2
    return noise(10 + rank, tokens, DIM), chosen_Nk, noise(20 + rank, tokens, 2)


def computed(experts: Experts, case: str, rank: int) -> dict[str, Tensor]:
    x_ND, chosen_Nk, weights_Nk = sent(case, rank)
    x_ND.requires_grad_()
    weights_Nk.requires_grad_()
    if case == "capacity":
        place_Nk = torch.arange(12).view(6, 2)  # each expert takes what stands in its first 7
        y_ND = experts.capped(x_ND, chosen_Nk, weights_Nk, place_Nk, 7)
    elif case == "even":
        y_ND = experts.each(x_ND.expand(EXPERTS, -1, -1) * torch.arange(1.0, 7)[:, None, None])
        y_ND = y_ND.sum(0)
    else:
        y_ND = experts.dropless(x_ND, chosen_Nk, weights_Nk)
    (y_ND * noise(30 + rank, *y_ND.shape)).sum().backward()
    nothing = torch.zeros_like(weights_Nk)
    assert x_ND.grad is not None
    weighted = nothing if weights_Nk.grad is None else weights_Nk.grad
    return {"y": y_ND.detach(), "x": x_ND.grad, "weights": weighted}


def made(gated: bool) -> Experts:
    experts = Experts(EXPERTS, DIM, 5, gated, "silu")
    initialise(experts, 0)
    return experts


def experts_on_a_rank(case: str, gated: bool, lazy: bool) -> dict[str, Tensor]:
    experts = made(gated)
    divide(experts, lazy)
    found = computed(experts, case, dist.get_rank())
    for name, parameter in experts.named_parameters():
        assert parameter.grad is not None
        found[name] = parameter.grad
    return found


CASES = ["uneven", "empty", "one takes all", "some get none", "capacity", "even"]


@pytest.mark.parametrize("case", CASES)
def test_three_ranks_hold_the_experts(three_ranks: Ranks, case: str) -> None:
    """Breaks if rows come back in another order, or a gradient is summed twice or not at all."""
    for gated, lazy in ((True, True), (False, False)):
        whole = made(gated)
        wanted = [computed(whole, case, rank) for rank in range(3)]
        got = three_ranks.run(experts_on_a_rank, case, gated, lazy)
        for rank in range(3):
            for name, value in wanted[rank].items():
                torch.testing.assert_close(got[rank][name], value)
        for name, parameter in whole.named_parameters():
            # Every rank's tokens, although each rank saw no gradient but its own.
            torch.testing.assert_close(torch.cat([each[name] for each in got]), parameter.grad)


class Messages(TorchDispatchMode):
    """Notes what is sent and what is waited for."""

    def __init__(self, seen: list[str]):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for name, note in (("all_to_all_single", "send"), ("wait_tensor", "wait")):
            if func.name() == f"_c10d_functional::{name}":
                self.seen.append(note)
        return func(*args, **(kwargs or {}))


def order_on_a_rank(mode: str, lazy: bool) -> tuple[list[str], list[str]]:
    """Messages, waits and shared experts in the order they happened, forward and backward."""
    moe = MoE(DIM, experts=4, width=5, shared=1, mode=mode)
    initialise(moe, 0)
    divide(moe, lazy)
    seen: list[str] = []
    assert moe.shared is not None
    moe.shared.register_forward_hook(lambda *_: seen.append("shared"))
    moe.shared.register_full_backward_hook(lambda *_: seen.append("shared"))
    x_BTD = noise(dist.get_rank(), 2, 6, DIM).requires_grad_()
    with Messages(seen):
        y_BTD = moe(x_BTD)
        forward = list(seen)
        seen.clear()
        y_BTD.sum().backward()
    return forward, seen


def test_shared_experts_compute_while_tokens_travel(ranks: Ranks) -> None:
    """Breaks if the rows, or the gradients on their way back, are waited for at once."""
    for forward, backward in ranks.run(order_on_a_rank, "dropless", True):
        counts, home = ["send", "wait"], ["send", "wait"]
        assert forward == [*counts, "send", "shared", "wait", *home]
        assert backward == ["send", "shared", "wait", *home]
    for forward, backward in ranks.run(order_on_a_rank, "capacity", True):
        assert forward == ["send", "shared", "wait", "send", "wait"]
        assert backward == ["send", "shared", "wait", "send", "wait"]
    for forward, backward in ranks.run(order_on_a_rank, "dropless", False):
        assert forward == ["send", "wait", "send", "wait", "shared", "send", "wait"]
        assert backward == ["send", "wait", "shared", "send", "wait"]


FEEDFORWARDS: dict[str, dict[str, Any]] = {
    "dropless": {"experts": 6, "shared": 1, "z": 0.01, "balance": 0.1},
    "capacity": {"experts": 6, "mode": "capacity", "capacity_factor": 0.7, "balance": 0.1},
    "top 1": {"experts": 6, "top_k": 1, "normalise": False, "activation": "polynorm"},
}


def model(feedforward: str) -> dict[str, Any]:
    found = config("experts")
    options = {"name": "moe", "ratio": 1, **FEEDFORWARDS[feedforward]}
    return {**found, "block": {**found["block"], "feedforward": options}}


@pytest.mark.parametrize("feedforward", FEEDFORWARDS)
def test_a_model_on_three_ranks(three_ranks: Ranks, feedforward: str) -> None:
    """Outputs, every gradient and the global norm."""
    layouts = {"ep3": {"ep": 3}}
    found = compare(three_ranks, model(feedforward), batch(6), layouts, stirred=True)["ep3"]
    assert found.worst < TOLERANCE, found


@pytest.mark.parametrize("recompute", ["block", "selective"])
def test_accumulated_and_recomputed(ranks: Ranks, recompute: str) -> None:
    """Without the balance loss, whose load is of one micro-batch."""
    whole = model("dropless")
    whole["block"]["feedforward"]["balance"] = 0.0
    layouts = {"ep2": {"ep": 2}}
    options = {"prepare": {"recompute": recompute}, "stirred": True, "micro_batches": 2}
    found = compare(ranks, whole, batch(8), layouts, **options)["ep2"]
    assert found.worst < TOLERANCE, found


def test_rows_travel_in_half_precision(ranks: Ranks) -> None:
    options = {"prepare": {"precision": "bf16"}, "stirred": True}
    found = compare(ranks, model("dropless"), batch(), {"ep2": {"ep": 2}}, **options)["ep2"]
    assert 1e-4 < found.output < 1e-2 and found.gradient < 5e-2, found


@pytest.mark.slow
def test_compiled(ranks: Ranks) -> None:
    options = {"prepare": {"compile": True}, "stirred": True}
    found = compare(ranks, model("dropless"), batch(), {"ep2": {"ep": 2}}, **options)["ep2"]
    assert found.worst < TOLERANCE, found


LARGE: dict[str, dict[str, Any]] = {
    "tp2×ep2": {"tp": 2, "ep": 2},
    "tp2+sp×ep2": {"tp": 2, "ep": 2, "sequence_parallel": True},
    "ep2×fsdp2": {"ep": 2, "fsdp": 2},
    "replicate2×ep2": {"replicate": 2, "ep": 2, "fsdp": 1},
    "ep2×cp2": {"ep": 2, "cp": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("feedforward", FEEDFORWARDS)
@pytest.mark.parametrize("layout", LARGE)
def test_four_ranks(four_ranks: Ranks, layout: str, feedforward: str) -> None:
    layouts = {layout: LARGE[layout]}
    found = compare(four_ranks, model(feedforward), batch(), layouts, stirred=True)[layout]
    assert found.worst < TOLERANCE, found


def test_a_checkpoint_of_divided_experts_is_read_by_one_process(ranks: Ranks) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ranks.run(write, model("dropless"), folder, {"ep": 2})
        fresh = filled(model("dropless"), 1, False)
        state = {name: parameter.detach() for name, parameter in fresh.named_parameters()}
        CheckpointStore(Path(folder)).load({"model": state})
    for name, expected in filled(model("dropless"), 0, True).named_parameters():
        assert state[name].equal(expected), name
