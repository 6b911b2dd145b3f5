"""Feed-forwards: f(x_BTD, stream) → y_BTD inside the region, each token by itself."""

from core.registry import export

export(__name__, globals())
