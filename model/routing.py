"""Token-choice routing: which experts a token goes to, with what weights, at what auxiliary cost.

Everything here is computed alike on every rank of the tensor axis.

Axes: B batch, T tokens, D width, E experts, k experts chosen per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from model.leaves import ReplicatedLinear
from model.precision import at_least_float32

Score = Literal["softmax", "sigmoid"]


@dataclass
class Routing:
    """logits: BTE, the router's output, at least float32.

    shares: BTE, the scores scaled to sum to one over the experts.
    chosen: BTk, the experts of each token, best first.
    weights: BTk, what multiplies their outputs.
    """

    logits: Tensor
    shares: Tensor
    chosen: Tensor
    weights: Tensor

    def load(self) -> Tensor:
        """The share of this rank's assignments that each expert receives, [E]; no gradient."""
        count_E = self.chosen.new_zeros(self.logits.shape[-1])
        flat = self.chosen.flatten()
        return count_E.index_add(0, flat, torch.ones_like(flat)) / flat.numel()

    def entropy(self) -> Tensor:
        """The mean entropy of the shares in nats; no gradient."""
        entropy_BT: Tensor = torch.special.entr(self.shares.detach()).sum(-1)
        return entropy_BT.mean()


class Router(ReplicatedLinear):
    """x BTD → logits BTE, in float32 whatever the precision around it.

    In half precision near-ties would be decided by rounding (Fedus et al. 2021, 2101.03961).
    """

    def __init__(self, dim: int, experts: int):
        super().__init__(dim, experts)

    def forward(self, x_BTD: Tensor) -> Tensor:
        with torch.autocast(x_BTD.device.type, enabled=False):
            weight_ED = self.value("weight")
            return F.linear(at_least_float32(x_BTD), at_least_float32(weight_ED))


def choose(logits_BTE: Tensor, top_k: int, score: Score, normalise: bool) -> Routing:
    """Each token's `top_k` best experts.

    softmax: scores are softmax(logits) (Shazeer et al. 2017, 1701.06538); sigmoid: each expert is
    scored by itself (DeepSeek-AI 2024, 2412.19437). With `normalise` the weights sum to one.
    """
    scores_BTE = logits_BTE.softmax(-1) if score == "softmax" else logits_BTE.sigmoid()
    weights_BTk, chosen_BTk = scores_BTE.topk(top_k, dim=-1)
    if normalise:
        weights_BTk = weights_BTk / weights_BTk.sum(-1, keepdim=True)
    shares_BTE = scores_BTE
    if score == "sigmoid":
        shares_BTE = scores_BTE / scores_BTE.sum(-1, keepdim=True)
    return Routing(logits_BTE, shares_BTE, chosen_BTk, weights_BTk)


def places(chosen_BTk: Tensor, experts: int) -> Tensor:
    """Each assignment's place in its expert's queue, [B, T, k]; every sample has its own queues.

    Assignments queue by token, then by choice, so what is dropped depends on the past alone and
    on no other sample: a causal model stays causal, and every data-parallel layout drops alike.
    """
    batch, tokens, k = chosen_BTk.shape
    chosen_BP = chosen_BTk.reshape(batch, tokens * k)
    order_BP = chosen_BP.argsort(dim=-1, stable=True)
    count_BE = chosen_BP.new_zeros(batch, experts)
    count_BE = count_BE.scatter_add(1, chosen_BP, torch.ones_like(chosen_BP))
    start_BE = count_BE.cumsum(-1) - count_BE
    rank_BP = torch.arange(tokens * k, device=chosen_BP.device)[None]
    place_BP = rank_BP - start_BE.gather(1, chosen_BP.gather(1, order_BP))
    return torch.empty_like(place_BP).scatter(1, order_BP, place_BP).view(batch, tokens, k)


def capacity(tokens: int, top_k: int, experts: int, factor: float) -> int:
    """How many tokens of a sample each expert takes: ceil(factor · k · T / E)."""
    return math.ceil(factor * top_k * tokens / experts)


def balance_loss(routing: Routing, load_E: Tensor) -> Tensor:
    """E · Σ_e f_e · p_be of each sample, [B] (Lepikhin et al. 2020, 2006.16668; 2101.03961).

    f_e (`load_E`) is the share of all assignments of the global batch that expert e receives and
    carries no gradient; p_be is the mean share of sample b's tokens. The mean over the samples of
    the global batch is the published loss, whose least value, at uniform routing, is 1.
    """
    share_BE = routing.shares.mean(1)
    return share_BE.shape[-1] * share_BE @ load_E.to(share_BE.dtype)


def z_loss(routing: Routing) -> Tensor:
    """Each sample's mean of logsumexp(logits)², [B] (Zoph et al. 2022, 2202.08906)."""
    return routing.logits.logsumexp(-1).square().mean(1)
