"""LayerNorm as two switches (Brody, Alon and Yahav 2023, 2305.02582).

    LN(x) = sqrt(D) · P x / ‖P x‖,   P = I − 1 1ᵀ / D

Axes: B batch, T tokens, D width.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from core.registry import register
from model.leaves import NormVector
from model.precision import at_least_float32


@register(
    "norm",
    "layernorm_expressivity",
    paper="2305.02582",
    title="On the Expressivity Role of LayerNorm in Transformers' Attention",
    aliases=["project_scale"],
)
class ProjectScale(nn.Module):
    """The two halves of LayerNorm, each with a switch of its own.

    Projection makes every key orthogonal to the ones vector, so that a query along it scores all
    keys alike: attention that counts comes for free. Scaling puts the keys on a sphere, so that
    each of them is the highest for some query; inside the hull of the others it never is. Both is
    LayerNorm, scaling alone RMSNorm, projection alone centring, neither the identity.

    Args:
        project: take each token's mean away.
        scale: divide by the root mean square of what is then left.
        eps: added to the mean square.
        gain: learn a gain per channel, which the analysis leaves out.
    """

    probe = {"gain": True}

    def __init__(
        self,
        dim: int,
        *,
        project: bool = True,
        scale: bool = True,
        eps: Annotated[float, Field(ge=0)] = 1e-5,
        gain: bool = False,
    ):
        super().__init__()
        self.project, self.scale, self.eps = project, scale, eps
        self.gain = NormVector(dim) if gain else None

    def forward(self, x_BTD: Tensor) -> Tensor:
        y_BTD = at_least_float32(x_BTD)
        if self.project:
            y_BTD = y_BTD - y_BTD.mean(-1, keepdim=True)
        if self.scale:
            y_BTD = y_BTD * (y_BTD.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        if self.gain is not None:
            y_BTD = y_BTD * self.gain()
        return y_BTD.to(x_BTD.dtype)
