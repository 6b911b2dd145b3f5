"""Sub-LN: a norm before each branch and one before its output projection (2210.06423).

y = x + W_O · norm(heads(norm(x))),   z = y + W_2 · norm(act(W_1 · norm(y)))
"""

from __future__ import annotations

import math
from typing import Annotated, Any

from core.registry import Slot, register
from model.placements.pre import PreNorm


def magneto_gain(depth: int, paired: int = 0, causal: bool = False) -> float:
    """γ of a stack of `depth` layers; arguments as in `deepnorm_constants`."""
    if not paired:
        return math.sqrt(math.log(2 * depth))
    if causal:
        return math.sqrt(math.log(3 * depth))
    return math.sqrt(math.log(3 * paired) * math.log(2 * depth) / 3)


@register(
    "placement",
    "magneto",
    paper="2210.06423",
    title="Foundation Transformers",
    aliases=["sub_ln", "subln"],
)
class SubLN(PreNorm):
    """Pre-norm with a second norm inside each branch, and first values scaled by γ (Wang et al.
    2022).

    γ multiplies the first values of all of a branch's matrices but those of queries and keys. With
    N layers alone γ = sqrt(log 2N); beside an encoder of N layers a decoder of M has sqrt(log 3M),
    and that encoder sqrt(log 3M · log 2N / 3). It is derived for Xavier initialisation, so the
    published form has `init: xavier`. The paper uses this one recipe for language, translation,
    vision, speech and both together, with larger learning rates than the usual placements bear.

    Args:
        inner: the norm inside the branches, rmsnorm or layernorm; the block's if not given.
        gamma: instead of the derived γ.
    """

    probe = {"inner": "layernorm"}

    def __init__(
        self,
        dim: int,
        norm: Any,
        depth: int = 1,
        paired: int = 0,
        causal: bool = False,
        *,
        inner: Annotated[Any, Slot("norm", optional=True)] = None,
        gamma: float | None = None,
    ):
        super().__init__(dim, norm)
        self.inner = norm if inner is None else inner
        self.gain = magneto_gain(depth, paired, causal) if gamma is None else gamma

    def options(self, branch: str) -> dict[str, Any]:
        return {"mid_norm" if branch == "feedforward" else "out_norm": self.inner}
