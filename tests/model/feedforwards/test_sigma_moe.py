"""σ-MoE against its formula; the dense limit; the entropy loss and its gradient."""

import math

import torch

from evaluation.contracts.probe import stir
from model.feedforwards.sigma_moe import SigmaMoE
from model.stream import Stream
from tests.model.reference import agree

X = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(0))


def formula(p, x, k):
    out = torch.zeros_like(x)
    scores = (x @ p["router.weight"].T).sigmoid()
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            for e in scores[b, t].argsort(descending=True)[:k]:
                h = (x[b, t] @ p["experts.up.weight"][e]).relu()
                y = torch.zeros_like(x)
                y[b, t] = 1
                out = out + y * scores[b, t, e] * (h @ p["experts.down.weight"][e])
    return out


def test_it_is_its_formula():
    """Breaks if weights are normalised, or scores are a softmax."""
    agree(SigmaMoE(6, experts=5, top_k=3, width=4), lambda p, x: formula(p, x, 3), X)


def test_all_experts_at_weight_one_are_one_dense_feedforward():
    """A router whose scores are all one; breaks if a weight is shared out among the experts."""
    module = SigmaMoE(6, experts=4, top_k=4, width=3).double()
    x = torch.cat((X.double(), torch.ones(2, 9, 1)), -1)[..., 1:]  # the last channel is one
    with torch.no_grad():
        module.router.weight.zero_()
        module.router.weight[:, -1] = 1000
    up = torch.cat(list(module.experts.up.weight), 1)
    down = torch.cat(list(module.experts.down.weight), 0)
    torch.testing.assert_close(module(x), (x @ up).relu() @ down, rtol=1e-12, atol=1e-12)


def test_entropy_loss_and_gradient():
    """Breaks if the entropy is taken token by token, or its sign is turned."""
    module = SigmaMoE(6, experts=5, top_k=2, width=4, entropy=0.5).double()
    stir(module, 0, 10.0)
    x = X.double()
    stream = Stream(x)
    module(x, stream)
    (ours,) = torch.autograd.grad(stream.losses["moe_entropy"].mean(), module.router.weight)
    p = (x @ module.router.weight.T).softmax(-1).mean((0, 1))
    loss = 0.5 * (p * p.log()).sum()
    (theirs,) = torch.autograd.grad(loss, module.router.weight)
    torch.testing.assert_close(stream.losses["moe_entropy"].mean(), loss)
    torch.testing.assert_close(ours, theirs)
    torch.nn.init.zeros_(module.router.weight)
    stream = Stream(x)
    module(x, stream)
    assert math.isclose(stream.losses["moe_entropy"].mean().item(), -0.5 * math.log(5))
    assert loss > -0.5 * math.log(5), "uniform use is the least"
