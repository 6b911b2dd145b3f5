"""What the framework is measured against: a small Llama and its training, written by hand.

Nothing of the project is used here. It is what a careful engineer writes for this one model: fused
attention, norm and optimizer, rotary tables made once, gradients set to None.

Axes: B batch, T tokens, D width, H heads, K head width, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of a step."""

    dim: int = 192
    depth: int = 6
    heads: int = 6
    kv_heads: int = 2
    hidden: int = 512
    vocab: int = 2048
    length: int = 256
    batch: int = 8
    micro_batches: int = 1


class Norm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x_BTD: Tensor) -> Tensor:
        return F.rms_norm(x_BTD, self.weight.shape, self.weight, 1e-6)


class Attention(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.width = shape.dim // shape.heads
        grouped = shape.kv_heads * self.width
        self.q = nn.Linear(shape.dim, shape.dim, bias=False)
        self.k = nn.Linear(shape.dim, grouped, bias=False)
        self.v = nn.Linear(shape.dim, grouped, bias=False)
        self.out = nn.Linear(shape.dim, shape.dim, bias=False)

    def forward(self, x_BTD: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
        q, k, v = (
            linear(x_BTD).unflatten(-1, (-1, self.width)).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        q, k = rotate(q, cos_TK, sin_TK), rotate(k, cos_TK, sin_TK)
        y_BHTK = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        y_BTD: Tensor = self.out(y_BHTK.transpose(1, 2).flatten(2))
        return y_BTD


def rotate(x_BHTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    first, second = x_BHTK.chunk(2, dim=-1)
    return torch.cat((first * cos_TK - second * sin_TK, second * cos_TK + first * sin_TK), dim=-1)


class FeedForward(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.gate = nn.Linear(shape.dim, shape.hidden, bias=False)
        self.up = nn.Linear(shape.dim, shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, shape.dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        y_BTD: Tensor = self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))
        return y_BTD


class Block(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.attention_norm, self.attention = Norm(shape.dim), Attention(shape)
        self.forward_norm, self.feedforward = Norm(shape.dim), FeedForward(shape)

    def forward(self, x_BTD: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), cos_TK, sin_TK)
        y_BTD: Tensor = x_BTD + self.feedforward(self.forward_norm(x_BTD))
        return y_BTD


class Llama(nn.Module):
    """Tokens BT and targets BT → the mean loss."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape):
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab, shape.dim)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.depth))
        self.norm = Norm(shape.dim)
        width = shape.dim // shape.heads
        speed_K = 10_000.0 ** (-torch.arange(0, width, 2) / width)
        angle_TK = torch.arange(shape.length)[:, None] * speed_K
        self.register_buffer("cos", angle_TK.cos())
        self.register_buffer("sin", angle_TK.sin())

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        x_BTD = self.embedding(tokens_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD, self.cos, self.sin)
        logits_BTV = F.linear(self.norm(x_BTD), self.embedding.weight)
        return F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten())


class PlainLoop:
    """Its training: AdamW in two groups, clipping, a cosine with warmup, the loss each step."""

    def __init__(self, shape: Shape, model: Llama, tokens: Tensor, steps: int, lr: float):
        self.shape, self.model, self.tokens = shape, model, tokens
        self.steps, self.lr, self.step = steps, lr, 0
        self.device = next(model.parameters()).device
        matrices = [p for p in model.parameters() if p.dim() > 1]
        vectors = [p for p in model.parameters() if p.dim() == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
            lr=lr,
            betas=(0.9, 0.95),
            fused=True,
        )
        self.losses: list[float] = []

    def rate(self) -> float:
        if self.step < 10:
            return self.lr * (self.step + 1) / 11
        progress = (self.step - 10) / (self.steps - 10)
        return self.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))

    def run(self, steps: int) -> None:
        """Train for so many steps."""
        for _ in range(steps):
            start = self.step * self.shape.batch % (len(self.tokens) - self.shape.batch + 1)
            rows = self.tokens[start : start + self.shape.batch]
            if self.device.type == "cuda":
                rows = rows.pin_memory().to(self.device, non_blocking=True)
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate()
            total = torch.zeros((), device=self.device)
            for part in rows.chunk(self.shape.micro_batches):
                with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
                    loss = self.model(part[:, :-1], part[:, 1:]) / self.shape.micro_batches
                loss.backward()
                total += loss.detach()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.losses.append(total.item())
            self.step += 1
