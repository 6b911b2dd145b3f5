"""DeepSeek-V3's mixture against a loop over tokens."""

import torch

from model.feedforwards.deepseek_moe import DeepSeekMoE
from model.stream import Stream
from tests.model.feedforwards.test_moe import expert
from tests.model.reference import agree

X = torch.randn(2, 13, 6, generator=torch.Generator().manual_seed(0))
OPTIONS = {"experts": 8, "top_k": 4, "groups": 4, "top_groups": 2, "width": 5, "scale": 2.5}
BIAS = torch.randn(8, generator=torch.Generator().manual_seed(1)).double() / 3


def scores(p, x_D):
    return 1 / (1 + (-(x_D @ p["router.weight"].T)).exp())


def slow(p, x_BTD):
    rows = []
    for x_D in x_BTD.flatten(0, 1):
        score_E = scores(p, x_D)
        ranked = (score_E + BIAS).tolist()
        # Groups of two experts: with 4 of 2 groups wanted, both of a group's scores are summed.
        worth = {g: ranked[2 * g] + ranked[2 * g + 1] for g in range(4)}
        groups = sorted(worth, key=lambda g: -worth[g])[:2]
        chosen = [e for g in groups for e in (2 * g, 2 * g + 1)]
        total = sum(score_E[e] for e in chosen)
        routed = sum(score_E[e] / total * expert(p, e, x_D, True) for e in chosen)
        gate, up, down = (p[f"shared.{name}.weight"].T for name in ("gate", "up", "down"))
        shared = (torch.nn.functional.silu(x_D @ gate) * (x_D @ up)) @ down
        rows.append(2.5 * routed + shared)
    return torch.stack(rows).view(x_BTD.shape)


def made(**options):
    moe = DeepSeekMoE(6, **OPTIONS, **options).double()
    with torch.no_grad():
        moe.router.balance.copy_(BIAS)
    return moe


def test_it_is_a_loop_over_tokens():
    """Breaks if weights hold the bias, groups are ranked by their best score, or scale is lost."""
    agree(made(), slow, X)


def test_the_balance_loss_is_sequence_wise():
    """Breaks if a sample's loss sees another sample's load, or the biases."""
    moe = made(balance=0.5)

    def ours(x):
        stream = Stream(x)
        moe(x, stream)
        return stream.losses["moe_balance"]

    def formula(p, x):
        losses = []
        for x_TD in x:
            score_TE = torch.stack([scores(p, x_D) for x_D in x_TD])
            f_E = torch.zeros(8).double()
            for score_E in score_TE:
                f_E[score_E.topk(4).indices] += 8 / (4 * 13)
            share_E = (score_TE / score_TE.sum(1, keepdim=True)).mean(0)
            losses.append(0.5 * (f_E * share_E).sum())
        return torch.stack(losses)

    agree(moe, formula, X, call=ours, tolerance=1e-6)


def test_published_defaults():
    with torch.device("meta"):
        moe = DeepSeekMoE(7168)
    shapes = {name: tuple(p.shape) for name, p in moe.named_parameters()}
    assert shapes["experts.up.weight"] == (256, 7168, 2048)
    assert shapes["shared.up.weight"] == (2048, 7168)
    assert moe.top_k == 8 and moe.active_fraction == 8 / 256
    assert (moe.groups.count, moe.groups.top, moe.groups.best) == (8, 4, 2)
    assert not moe.router.balance.requires_grad
