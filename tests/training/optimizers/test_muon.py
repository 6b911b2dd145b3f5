"""Muon against a slow reference, one matrix at a time."""

import math

import pytest
import torch
from torch import Tensor, nn

from core.errors import UserError
from core.registry import build
from model.leaves import ExpertBank, NormVector
from model.roles import roles
from tests.training.optimizers.test_adamw import backward, tiny
from training.optimizers.adamw import AdamW
from training.optimizers.muon import Muon, orthogonalise


def slow_orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """The quintic on the singular values themselves, by the decomposition, in float64."""
    u, s, vh = torch.linalg.svd(matrix.double() / matrix.double().norm(), full_matrices=False)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u @ torch.diag(s) @ vh).to(matrix.dtype)


@pytest.mark.parametrize("shape", [(6, 6), (12, 5), (5, 12), (1, 7)])
def test_orthogonalise_is_the_quintic_on_the_singular_values(shape):
    torch.manual_seed(0)
    batch = torch.randn(3, *shape)
    expected = torch.stack([slow_orthogonalise(matrix) for matrix in batch])
    torch.testing.assert_close(orthogonalise(batch), expected, rtol=1e-4, atol=1e-4)


def test_singular_values_come_near_one():
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(1, 64, 48))[0])
    assert values.min() > 0.6 and values.max() < 1.3


@pytest.mark.parametrize("scale", ["aspect", "rms"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_are_the_slow_reference(scale, nesterov):
    model, twin = tiny(), tiny()
    known = roles(model)
    options = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "adam_lr": 1e-3}
    optimizer = Muon(model, **options, scale=scale, nesterov=nesterov)
    adam = AdamW(twin, lr=1e-3, weight_decay=0.1)
    momenta = {n: torch.zeros_like(p) for n, p in twin.named_parameters() if known[n].matrix}
    assert momenta and len(momenta) < len(known)
    for step, factor in enumerate((1.0, 0.5, 0.5)):
        backward(model, step)
        backward(twin, step)
        optimizer.step(factor)
        before = {name: p.detach().clone() for name, p in twin.named_parameters()}
        adam.step(factor)  # right for the rest; the matrices are put right below
        for name, p in twin.named_parameters():
            if name not in momenta:
                continue
            momenta[name] = 0.9 * momenta[name] + 0.1 * p.grad
            ahead = 0.1 * p.grad + 0.9 * momenta[name] if nesterov else momenta[name]
            rows, columns = p.shape
            size = (
                math.sqrt(max(1, rows / columns))
                if scale == "aspect"
                else 0.2 * math.sqrt(max(rows, columns))
            )
            lr = 0.02 * factor
            p.data = before[name] * (1 - lr * 0.1) - lr * size * slow_orthogonalise(ahead)
        optimizer.zero_grad()
        adam.zero_grad()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=2e-4, msg=name)


def test_a_bank_of_experts_is_as_many_matrices():
    torch.manual_seed(0)
    bank = ExpertBank(3, 4, 6, split="column")
    before = bank.weight.detach().clone()
    gradient = torch.randn_like(before)
    bank.weight.grad = gradient
    Muon(bank, lr=0.1, momentum=0.0, nesterov=False).step(1.0)
    for i in range(3):
        # A bank's matrices are in,out: six outputs over four inputs.
        expected = before[i] - 0.1 * math.sqrt(6 / 4) * slow_orthogonalise(gradient[i])
        torch.testing.assert_close(bank.weight[i].detach(), expected, rtol=1e-3, atol=1e-4)


def test_state_names_momentum_for_matrices_and_adamws_for_the_rest():
    model = tiny()
    state = build("optimizer", "muon", model=model).state()
    known = roles(model)
    assert set(state) == set(known)
    for name, held in state.items():
        assert ("momentum" in held) == known[name].matrix


def test_a_model_without_matrices_is_the_users_mistake():
    with pytest.raises(UserError, match="use adamw"):
        Muon(nn.Sequential(NormVector(4)))
