"""The benchmark of experts runs, and compares models of equal active cost."""

import torch

from benchmarks.moe import CASES, Case, configs, measure
from model.accounting import count
from model.zoo import build_model


def test_both_models_take_turns():
    case = Case(dim=32, depth=1, width=64, vocab=32, length=8, batch=2)
    dense, sparse = measure(case, 3, torch.device("cpu"))
    assert len(dense) == len(sparse) == 3
    assert all(seconds > 0 for seconds in dense + sparse)


def test_active_operations_are_equal_but_for_the_router():
    """Breaks if the experts' width is not the dense one's share."""
    case = CASES["small"]
    batch = {"tokens": torch.zeros(2, 8, dtype=torch.long)}
    with torch.device("meta"):
        dense, sparse = (count(build_model(config), batch) for config in configs(case))
    router = 2 * 16 * case.dim * 8 * case.depth
    assert sparse.forward_flops - dense.forward_flops == router
    assert sparse.by_part["moe"] > 3.9 * dense.by_part["dense"]
