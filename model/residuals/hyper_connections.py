"""Hyper-connections: several residual streams, mixed by learned weights around every branch.

With H the n streams of a token (n×D), f the branch and its norm,

    x = A_mᵀ H                       what the branch reads, A_m: n
    H' = B f(x)ᵀ + A_rᵀ H            what it leaves, B: n, A_r: n×n

In the dynamic form each matrix is a static part plus a part that depends on the token:

    A_m + s_α tanh(norm(H) W_m),  A_r + s_α tanh(norm(H) W_r),  B + s_β tanh(norm(H) W_β)

Axes: B batch, T tokens, n streams, D width.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from core.registry import Slot, build, register
from model.leaves import Leaf, Replicated, ReplicatedLinear
from model.residuals.base import Residual
from model.stream import Stream

_STREAMS = "hyper_streams"  # carried: the streams but the first, which is `hidden`; B,T,n−1,D
_SHARES = "hyper_shares"  # carried from read to write: B, each stream's share of the output


class Mix(Leaf):
    """weights [(B, T,) m, n] times streams BTnD → BTmD."""

    def forward(self, weights: Tensor, streams_BTnD: Tensor) -> Tensor:
        return weights @ streams_BTnD

    def flops(self, *inputs: Tensor) -> int:
        return 2 * inputs[0].shape[-2] * inputs[1].numel()


@register(
    "residual",
    "hyper_connections",
    paper="2409.19606",
    title="Hyper-Connections",
    aliases=["hyper"],
)
class HyperConnections(Residual):
    """n streams, each branch with its own weights for reading, leaving and mixing them (Zhu et al.
    2024).

    The streams start as copies of the input and are summed at the end. At the start the branch k
    reads stream k mod n, its output goes to all, and no stream moves into another: the pre-norm
    transformer. The paper reports 1.8 times faster convergence for a mixture of experts of 7B. It
    also scales the matrices that write to the streams by sqrt(n) at the start, which is left to
    the init scheme.

    Args:
        streams: how many streams n; the paper's expansion rate.
        dynamic: add the weights that depend on the token.
        tanh: squash what depends on the token.
        scale: first value of s_α and s_β.
        norm: the norm before W_m, W_r and W_β.
    """

    defers = True
    whole_stack = True
    # The scales' gradients are sums over all streams that nearly cancel where these are alike, as
    # in a shallow model; fewer streams leave more than rounding of them.
    probe = {"streams": 2}

    def __init__(
        self,
        dim: int,
        sublayer: int = 0,
        *,
        streams: Annotated[int, Field(gt=0)] = 4,
        dynamic: bool = True,
        tanh: bool = True,
        scale: float = 0.01,
        norm: Annotated[Any, Slot("norm")] = "layernorm",
    ):
        super().__init__()
        self.streams, self.tanh = streams, tanh

        def first(shape: torch.Size, generator: torch.Generator) -> Tensor:
            reads = F.one_hot(torch.tensor(sublayer % streams), streams)[:, None]
            return torch.cat((reads, torch.eye(streams)), dim=1)

        self.alpha = Replicated(streams, streams + 1, fill=first)  # A_m, then A_r
        self.beta = Replicated(streams, fill="ones")
        self.mix = Mix()
        self.norm = build("norm", norm, dim=dim) if dynamic else None
        if dynamic:
            # The rows of W_m, W_r and W_β, in this order.
            self.depends = ReplicatedLinear(dim, streams + 2, fill="zeros")
            self.alpha_scale = Replicated(1, fill=scale)
            self.beta_scale = Replicated(1, fill=scale)

    def begin(self, stream: Stream) -> None:
        copies = stream.hidden[:, :, None].expand(-1, -1, self.streams - 1, -1)
        stream.carried[_STREAMS] = copies.contiguous()

    def read(self, stream: Stream) -> Tensor:
        """Sets the streams to A_rᵀ H, to which `write` adds B f(x)ᵀ."""
        streams_BTnD = torch.cat((stream.hidden[:, :, None], stream.carried[_STREAMS]), dim=2)
        alpha, beta = self.weights(streams_BTnD)
        mixed_BTmD = self.mix(alpha.transpose(-1, -2), streams_BTnD)
        x_BTD: Tensor = mixed_BTmD[:, :, 0]
        stream.hidden = mixed_BTmD[:, :, 1]
        stream.carried[_STREAMS] = mixed_BTmD[:, :, 2:]
        stream.carried[_SHARES] = beta.expand(*x_BTD.shape[:2], -1)
        return x_BTD

    def weights(self, streams_BTnD: Tensor) -> tuple[Tensor, Tensor]:
        """(A_m, A_r) as [(B, T,) n, n+1] and B as [(B, T,) n]."""
        alpha, beta = self.alpha(), self.beta()
        if self.norm is not None:
            token = self.depends(self.norm(streams_BTnD))
            token = token.tanh() if self.tanh else token
            alpha = alpha + self.alpha_scale() * token[..., :-1]
            beta = beta + self.beta_scale() * token[..., -1]
        return alpha.to(streams_BTnD.dtype), beta.to(streams_BTnD.dtype)

    def write(self, stream: Stream, y_BTD: Tensor) -> None:
        shares_BTn1 = stream.carried.pop(_SHARES)[..., None]
        stream.hidden = stream.hidden + shares_BTn1[:, :, 0] * y_BTD
        added_BTnD = shares_BTn1[:, :, 1:] * y_BTD[:, :, None]
        stream.carried[_STREAMS] = stream.carried[_STREAMS] + added_BTnD

    def finish(self, stream: Stream) -> None:
        stream.hidden = stream.hidden + stream.carried.pop(_STREAMS).sum(2)
