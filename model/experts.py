"""A bank of feed-forward experts, and the two ways of handing tokens to them.

Axes: N tokens of all samples, P assignments of tokens to experts, D width, F hidden channels,
E experts, C capacity, k experts chosen per token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.registry import build
from model.leaves import ExpertBank


class Experts(nn.Module):
    """E feed-forwards: W_down · act(W_up x), or gated W_down · (act(W_gate x) ⊙ W_up x).

    Inside the region; what comes out are partial sums, since each rank of the tensor axis holds
    part of every expert's hidden channels.
    """

    def __init__(self, experts: int, dim: int, hidden: int, gated: bool, activation: Any):
        super().__init__()
        self.experts, self.dim, self.hidden = experts, dim, hidden
        self.gate = ExpertBank(experts, dim, hidden, "column") if gated else None
        self.up = ExpertBank(experts, dim, hidden, "column")
        self.activation = build("activation", activation, dim=hidden)
        self.down = ExpertBank(experts, hidden, dim, "row")

    def flops(self, tokens: int) -> int:
        """Forward operations for this many assignments."""
        return 2 * tokens * self.dim * self.hidden * (2 if self.gate is None else 3)

    def dropless(self, x_ND: Tensor, chosen_Nk: Tensor, weights_Nk: Tensor) -> Tensor:
        """Every token reaches all its experts, however uneven the load: y ND."""
        tokens, k = chosen_Nk.shape
        order_P = chosen_Nk.flatten().argsort(stable=True)  # assignments grouped by expert
        count_E = chosen_Nk.new_zeros(self.experts)
        count_E = count_E.index_add(0, chosen_Nk.flatten(), torch.ones_like(order_P))
        weights = [bank() for bank in (self.gate, self.up, self.down) if bank is not None]
        x_PD = x_ND[order_P // k]
        if x_ND.is_cuda and _product_dtype(x_ND) == torch.bfloat16:
            y_PD = self._grouped(x_PD, weights, count_E)
        else:
            parts = zip(x_PD.split(count_E.tolist()), *(w.unbind() for w in weights), strict=True)
            y_PD = torch.cat([self._expert(x, list(w)) for x, *w in parts])
        back_P = torch.empty_like(order_P).scatter(0, order_P, _range(order_P))
        y_NkD = y_PD[back_P].view(tokens, k, -1)
        return (y_NkD * weights_Nk[..., None].to(y_NkD.dtype)).sum(1)

    def _expert(self, x_PD: Tensor, weights: list[Tensor]) -> Tensor:
        """One expert's tokens, or with a leading axis E every expert's."""
        *into, down_FD = weights
        h_PF = self.activation(x_PD @ into[0])
        if len(into) == 2:
            h_PF = h_PF * (x_PD @ into[1])
        y_PD: Tensor = h_PF @ down_FD
        return y_PD

    def each(self, x_ECD: Tensor) -> Tensor:
        """Every expert on its own C tokens: y ECD."""
        weights = [bank() for bank in (self.gate, self.up, self.down) if bank is not None]
        return self._expert(x_ECD, weights)

    def _grouped(self, x_PD: Tensor, weights: list[Tensor], count_E: Tensor) -> Tensor:
        """All experts in one kernel per matrix, with no wait for the counts on the host."""
        ends_E = count_E.cumsum(0).to(torch.int32)
        *into, down = (weight.bfloat16() for weight in weights)
        x_PD = x_PD.bfloat16()
        h_PF = self.activation(F.grouped_mm(x_PD, into[0], offs=ends_E))
        if len(into) == 2:
            h_PF = h_PF * F.grouped_mm(x_PD, into[1], offs=ends_E)
        return F.grouped_mm(h_PF.bfloat16(), down, offs=ends_E)

    def capped(
        self, x_ND: Tensor, chosen_Nk: Tensor, weights_Nk: Tensor, place_Nk: Tensor, capacity: int
    ) -> Tensor:
        """Each expert takes the assignments whose place is below `capacity`: y ND.

        Shapes are static whatever the routing; the assignments left out add nothing. `place_Nk`
        counts within queues whose places below `capacity` no two assignments of an expert share.
        """
        tokens, k = chosen_Nk.shape
        last = self.experts * capacity  # one row more, which takes all that is left out
        slot_Nk = torch.where(place_Nk < capacity, chosen_Nk * capacity + place_Nk, last)
        token_P = _range(slot_Nk.flatten()) // k
        held_S = torch.full((last + 1,), tokens, device=x_ND.device)
        held_S = held_S.scatter(0, slot_Nk.flatten(), token_P)[:last]
        padded = torch.cat((x_ND, x_ND.new_zeros(1, x_ND.shape[1])))  # the empty slots' token
        x_ECD = padded[held_S].view(self.experts, capacity, -1)
        y_SD = self.each(x_ECD).flatten(0, 1)
        y_SD = torch.cat((y_SD, y_SD.new_zeros(1, y_SD.shape[1])))
        return (y_SD[slot_Nk] * weights_Nk[..., None].to(y_SD.dtype)).sum(1)


def _range(like_P: Tensor) -> Tensor:
    return torch.arange(like_P.shape[0], device=like_P.device)


def _product_dtype(x: Tensor) -> torch.dtype:
    """The type in which a matrix product of x is computed here."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
