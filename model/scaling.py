"""The scaling law of fine-grained mixtures of experts (Krajewski et al. 2024, 2402.07871).

    L(N, D, G) = c + (g / G^γ + a) / N^α + b / D^β

with N all non-embedding parameters, experts included, D the training tokens and G the granularity:
how many times narrower an expert is than the feed-forward it replaces. Measured with mixtures of E
times the parameters of the dense feed-forward ("expansion"), on C4.
"""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import UserError


@dataclass(frozen=True)
class Law:
    """The law's constants; `g` is 0 for dense models."""

    a: float
    alpha: float
    b: float
    beta: float
    g: float = 0.0
    gamma: float = 1.0
    c: float = 0.47

    def loss(self, parameters: float, tokens: float, granularity: float = 1.0) -> float:
        """Nats per token.

        Args:
            parameters: all but the embeddings, every expert counted.
            tokens: seen in training.
            granularity: G; no less than 1.
        """
        if min(parameters, tokens) <= 0 or granularity < 1:
            raise UserError("scaling law: parameters and tokens above 0, granularity at least 1")
        width = self.g / granularity**self.gamma + self.a
        return float(self.c + width / parameters**self.alpha + self.b / tokens**self.beta)


LAWS: dict[int, Law] = {
    1: Law(a=16.3, alpha=0.126, b=26.7, beta=0.127),
    16: Law(a=19.64, alpha=0.124, b=57.07, beta=0.169, g=1.18, gamma=0.986),
    64: Law(a=18.1, alpha=0.115, b=30.8, beta=0.147, g=2.1, gamma=0.58),
}
"""The published fits, by expansion E; 1 is the dense model."""


def fine_grained_loss(
    parameters: float, tokens: float, granularity: float = 1.0, expansion: int = 64
) -> float:
    """The loss that the law of this expansion gives, in nats per token.

    The constants are published rounded: for large models the result lies some 0.1 below the
    paper's own table, in the same order.

    Raises:
        UserError: for an expansion that was not measured.
    """
    if expansion not in LAWS:
        raise UserError(f"scaling law: expansion {expansion} was not measured; use 1, 16 or 64")
    return LAWS[expansion].loss(parameters, tokens, granularity)


def training_flops(
    dim: int, blocks: int, tokens: float, granularity: float, expansion: int, router: float = 14.0
) -> float:
    """The paper's count, F = (12·d²·6 + d·E·G·c_r) · D · blocks, with attention's four projections
    and the active feed-forward in the first term and the router in the second.

    Args:
        router: c_r, operations per router parameter and token; the paper finds 6 to 20 plausible.
    """
    return (72 * dim**2 + dim * expansion * granularity * router) * tokens * blocks


def best_granularity(parameters: int, dim: int, blocks: int, flops: float, expansion: int) -> int:
    """The power of two whose model of this size has the lowest loss within a training budget.

    A finer mixture has a larger router, so fewer tokens fit into the budget.
    """

    def loss(granularity: float) -> float:
        per_token = training_flops(dim, blocks, 1.0, granularity, expansion)
        return fine_grained_loss(parameters, flops / per_token, granularity, expansion)

    return min((1 << power for power in range(11)), key=loss)
