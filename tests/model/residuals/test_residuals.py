"""Residual topologies against their recurrences."""

import torch

from core.config import parse
from model.init import initialise
from model.language import LanguageConfig, LanguageModel


def small(residual, depth=3, placement="pre"):
    config = parse(
        LanguageConfig,
        {
            "dim": 16, "depth": depth, "vocab": 11, "max_length": 8,
            "block": {"mixer": {"name": "attention", "heads": 2}, "residual": residual,
                      "placement": placement},
        },
    )  # fmt: skip
    model = LanguageModel(config).double()
    initialise(model, 0)
    return model


def branches(model):
    """Each branch as a plain function of what it reads, norms included."""
    for block in model.stack.blocks:
        for layer in block.sublayers.values():
            yield lambda x, layer=layer: layer.branch(layer.placement.before(x), stream())


def stream():
    from model.stream import Stream

    return Stream(torch.empty(0))


def final(model, ids):
    return model.stack(model.embed({"tokens": ids})).hidden


IDS = torch.randint(0, 11, (2, 8), generator=torch.Generator().manual_seed(0))


def test_standard_recurrence():
    model = small("standard")
    x = model.embedding(IDS)
    for f in branches(model):
        x = x + f(x)
    torch.testing.assert_close(final(model, IDS), model.stack.norm(x))


def test_ladder_recurrence():
    """x_i = x_{i−1} + f_i(x_{i−2}), x_{−1} = x_0."""
    model = small("ladder")
    older = newer = model.embedding(IDS)
    for f in branches(model):
        older, newer = newer, newer + f(older)
    torch.testing.assert_close(final(model, IDS), model.stack.norm(newer))
    standard = small("standard")
    assert not torch.allclose(final(model, IDS), final(standard, IDS))


def test_ladder_mixed_with_standard_settles_first():
    """A standard block after a ladder block reads the whole stream."""
    config = small("standard").config
    mixed = config.replace(block=[{**config.block[0].dump(), "residual": r} for r in
                                  ("ladder", "standard")], depth=2)  # fmt: skip
    model = LanguageModel(mixed).double()
    initialise(model, 0)
    older = newer = model.embedding(IDS)
    functions = list(branches(model))
    for f in functions[:2]:
        older, newer = newer, newer + f(older)
    for f in functions[2:]:
        newer = newer + f(newer)
    torch.testing.assert_close(final(model, IDS), model.stack.norm(newer))


def test_hybrid_ladder_of_a_trained_model():
    """The upper half of a standard model becomes ladder: it has the same parameters under the same
    names, so a checkpoint of the one is read by the other. Breaks if the switch settles the sum
    that the lower half left, twice or never."""
    standard = small("standard", depth=4)
    block = standard.config.block[0].dump()
    pattern = [{**block, "residual": r} for r in ("standard", "standard", "ladder", "ladder")]
    hybrid = LanguageModel(standard.config.replace(block=pattern)).double()
    hybrid.load_state_dict(standard.state_dict(), strict=True)
    older = newer = standard.embedding(IDS)
    for f in list(branches(standard))[:4]:
        older = newer = newer + f(newer)
    for f in list(branches(standard))[4:]:
        older, newer = newer, newer + f(older)
    torch.testing.assert_close(final(hybrid, IDS), standard.stack.norm(newer))


def test_ladder_of_silent_branches_is_standard():
    """With every branch's output zero but one, there is nothing to be late for."""
    ladder, standard = small("ladder"), small("standard")
    for model in (ladder, standard):
        outputs = [p for n, p in model.named_parameters() if "out.weight" in n or "down." in n]
        for parameter in outputs[:2] + outputs[3:]:
            torch.nn.init.zeros_(parameter)
    torch.testing.assert_close(final(ladder, IDS), final(standard, IDS))
