"""Published language models at their published sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from core.registry import register

ModelConfig = dict[str, Any]


def _gpt2(name: str, dim: int, depth: int, heads: int) -> Callable[[], ModelConfig]:
    """GPT-2 (Radford et al. 2019): learned positions, pre-norm, GELU by its tanh form, biases."""

    def config() -> ModelConfig:
        return {
            "kind": "language",
            "dim": dim,
            "depth": depth,
            "vocab": 50_257,
            "max_length": 1024,
            "tie_embeddings": True,
            "embedding_dropout": 0.1,
            "init": {"name": "normal", "std": 0.02},
            "block": {
                "norm": {"name": "layernorm", "eps": 1e-5},
                "placement": "pre",
                "position": "learned",
                "mixer": {"name": "attention", "heads": heads, "bias": True, "dropout": 0.1},
                "feedforward": {
                    "name": "mlp",
                    "ratio": 4.0,
                    "activation": {"name": "gelu", "approximate": True},
                },
                "dropout": 0.1,
            },
        }

    return _published(name, config, title="Language Models are Unsupervised Multitask Learners")


def _llama(
    name: str,
    paper: str,
    title: str,
    *,
    dim: int,
    depth: int,
    heads: int,
    kv_heads: int,
    width: int,
    vocab: int,
    max_length: int,
    base: float = 10_000.0,
    eps: float = 1e-5,
    tied: bool = False,
    moe: ModelConfig | None = None,
) -> Callable[[], ModelConfig]:
    """The Llama shape (Touvron et al. 2023): RMSNorm, RoPE, SwiGLU, grouped queries, no biases."""

    def config() -> ModelConfig:
        feedforward = {"name": "swiglu", "width": width} if moe is None else {"name": "moe", **moe}
        return {
            "kind": "language",
            "dim": dim,
            "depth": depth,
            "vocab": vocab,
            "max_length": max_length,
            "tie_embeddings": tied,
            "init": {"name": "normal", "std": 0.02},
            "block": {
                "norm": {"name": "rmsnorm", "eps": eps},
                "placement": "pre",
                "position": {"name": "rope", "base": base},
                "mixer": {"name": "attention", "heads": heads, "kv_heads": kv_heads},
                "feedforward": feedforward,
            },
        }

    return _published(name, config, paper=paper, title=title)


def _published(
    name: str, config: Callable[[], ModelConfig], *, title: str, paper: str | None = None
) -> Callable[[], ModelConfig]:
    config.__name__ = config.__qualname__ = name
    config.__doc__ = f"{title}."
    return register("model", name, paper=paper, title=title)(config)


gpt2 = _gpt2("gpt2", 768, 12, 12)
gpt2_medium = _gpt2("gpt2_medium", 1024, 24, 16)
gpt2_large = _gpt2("gpt2_large", 1280, 36, 20)
gpt2_xl = _gpt2("gpt2_xl", 1600, 48, 25)

_LLAMA2 = ("2307.09288", "Llama 2: Open Foundation and Fine-Tuned Chat Models")
_LLAMA3 = ("2407.21783", "The Llama 3 Herd of Models")
_OLD: Any = {"vocab": 32_000, "max_length": 4096}
_NEW: Any = {"vocab": 128_256, "max_length": 8192, "base": 500_000.0}

llama2_7b = _llama(
    "llama2_7b", *_LLAMA2, dim=4096, depth=32, heads=32, kv_heads=32, width=11_008, **_OLD
)
llama2_13b = _llama(
    "llama2_13b", *_LLAMA2, dim=5120, depth=40, heads=40, kv_heads=40, width=13_824, **_OLD
)
llama2_70b = _llama(
    "llama2_70b", *_LLAMA2, dim=8192, depth=80, heads=64, kv_heads=8, width=28_672, **_OLD
)
llama3_8b = _llama(
    "llama3_8b", *_LLAMA3, dim=4096, depth=32, heads=32, kv_heads=8, width=14_336, **_NEW
)
llama3_70b = _llama(
    "llama3_70b", *_LLAMA3, dim=8192, depth=80, heads=64, kv_heads=8, width=28_672, **_NEW
)
tinyllama_1b = _llama(
    "tinyllama_1b",
    "2401.02385",
    "TinyLlama: An Open-Source Small Language Model",
    dim=2048,
    depth=22,
    heads=32,
    kv_heads=4,
    width=5632,
    vocab=32_000,
    max_length=2048,
)
mixtral_8x7b = _llama(
    "mixtral_8x7b",
    "2401.04088",
    "Mixtral of Experts",
    dim=4096,
    depth=32,
    heads=32,
    kv_heads=8,
    width=14_336,
    vocab=32_000,
    max_length=32_768,
    base=1e6,
    moe={"experts": 8, "top_k": 2, "width": 14_336, "balance": 0.02},
)
