"""AdamW against torch.optim, with the groups that roles name."""

import torch

from core.registry import build
from model.init import initialise
from model.roles import roles
from tests.training.helpers import LANGUAGE, language_data
from training.optimizers.adamw import AdamW


def tiny(seed: int = 0):
    from model.zoo import build_model

    model = build_model(LANGUAGE)
    initialise(model, seed)
    return model


def backward(model, index: int) -> None:
    items = [language_data().train[8 * index + i] for i in range(8)]
    batch = {key: torch.stack([item[key] for item in items]) for key in items[0]}
    model(batch).token_losses.mean().backward()


def test_steps_are_torchs_with_decay_only_where_roles_say():
    ours, theirs = tiny(), tiny()
    optimizer = AdamW(ours, lr=1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)
    known = roles(theirs)
    named = list(theirs.named_parameters())
    reference = torch.optim.AdamW(
        [
            {"params": [p for n, p in named if known[n].decay], "weight_decay": 0.3},
            {"params": [p for n, p in named if not known[n].decay], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.8, 0.9),
        eps=1e-6,
        foreach=False,
    )
    for step, factor in enumerate((1.0, 0.5, 0.25)):
        backward(ours, step)
        backward(theirs, step)
        optimizer.step(factor)
        for group in reference.param_groups:
            group["lr"] = 1e-2 * factor
        reference.step()
        optimizer.zero_grad()
        reference.zero_grad()
    for (name, a), (_, b) in zip(ours.named_parameters(), named, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=name)


def test_decay_leaves_norms_alone_and_shrinks_matrices():
    model = tiny()
    optimizer = AdamW(model, lr=0.1, weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step(1.0)
    known = roles(model)
    assert {known[name].decay for name in before} == {True, False}
    for name, p in model.named_parameters():
        expected = before[name] * (0.95 if known[name].decay else 1.0)
        torch.testing.assert_close(p.detach(), expected, msg=name)


def test_state_is_complete_before_the_first_step_and_loads_in_place():
    first, second = tiny(0), tiny(0)
    a, b = (build("optimizer", "adamw", model=m) for m in (first, second))
    for step in range(2):
        backward(first, step)
        a.step(1.0)
        a.zero_grad()
    assert set(b.state()) == set(dict(first.named_parameters()))
    for name, held in b.state().items():
        for key, value in held.items():
            value.copy_(a.state()[name][key])
    with torch.no_grad():
        for p, q in zip(second.parameters(), first.parameters(), strict=True):
            p.copy_(q)
    for model, optimizer in ((first, a), (second, b)):
        backward(model, 3)
        optimizer.step(1.0)
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_parameter_without_a_gradient_stays():
    model = tiny()
    optimizer = AdamW(model)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step(1.0)
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, q)
