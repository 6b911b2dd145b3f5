"""DeepNorm: post-norm whose residual weighs more the deeper the model (2203.00555).

    x ← norm(α · x + f(x)),   first values of f's matrices multiplied by β

N layers of the encoder, M of the decoder.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from core.registry import register
from model.placements.post import PostNorm


def deepnorm_constants(depth: int, paired: int = 0, causal: bool = False) -> tuple[float, float]:
    """α and β of a stack of `depth` layers (Wang et al. 2022, table in figure 2).

    paired: layers of the other stack of an encoder-decoder, of which the decoder is `causal`.
    """
    if not paired:
        return (2 * depth) ** (1 / 4), (8 * depth) ** (-1 / 4)
    if causal:
        return (3 * depth) ** (1 / 4), (12 * depth) ** (-1 / 4)
    joint = (depth**4 * paired) ** (1 / 16)
    return 0.81 * joint, 0.87 / joint


@register(
    "placement",
    "deepnorm",
    paper="2203.00555",
    title="DeepNet: Scaling Transformers to 1,000 Layers",
    aliases=["deep_norm"],
)
class DeepNorm(PostNorm):
    """Post-norm with the residual scaled by α and first values scaled by β (Wang et al. 2022).

    An encoder or a decoder alone has α = (2N)^¼ and β = (8N)^−¼; a decoder beside an encoder
    (3M)^¼ and (12M)^−¼, that encoder 0.81 (N⁴M)^(1/16) and 0.87 (N⁴M)^(−1/16). β reaches every
    matrix but those of queries and keys. The constants are derived for Xavier initialisation, so
    the published form has `init: xavier`. The paper trains 1,000 layers where post-norm diverges.

    Args:
        alpha: instead of the derived α.
        beta: instead of the derived β.
    """

    def __init__(
        self,
        dim: int,
        norm: Any,
        depth: int = 1,
        paired: int = 0,
        causal: bool = False,
        *,
        alpha: float | None = None,
        beta: float | None = None,
    ):
        super().__init__(dim, norm)
        derived = deepnorm_constants(depth, paired, causal)
        self.alpha = derived[0] if alpha is None else alpha
        self.gain = derived[1] if beta is None else beta

    def keep(self, x_BTD: Tensor) -> Tensor:
        return self.alpha * x_BTD
