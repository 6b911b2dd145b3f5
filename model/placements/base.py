"""The placement protocol.

A sublayer computes, with f its mixer or feed-forward:

    x = residual.read(stream);  y = after(f(before(x)));  residual.write(stream, y)
    stream.hidden = close(stream.hidden)

A placement says where norms stand by filling `before`, `after` and `close`; all three work on the
stream, outside the region.
"""

from __future__ import annotations

from torch import Tensor, nn


class Placement(nn.Module):
    """Base: no norm anywhere. `final_norm` says whether the stack ends with a norm of its own."""

    final_norm: bool = True
    closes: bool = False
    """Whether `close` changes the hidden state; not with residuals that leave a sum pending."""

    def before(self, x_BTD: Tensor) -> Tensor:
        return x_BTD

    def after(self, y_BTD: Tensor) -> Tensor:
        return y_BTD

    def close(self, x_BTD: Tensor) -> Tensor:
        return x_BTD
