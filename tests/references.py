"""Other people's implementations, imported for comparison."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest
import torch

_declared: list[torch.library.Library] = []


def import_timm() -> ModuleType:
    """timm, or a skipped test where it is not installed."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed; `make venv` installs it")
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        # torchvision's CUDA build cannot load its operators beside a CPU build of torch, and then
        # trips over describing two of them. timm's models use none, so a declaration is enough.
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)  # the declaration ends with the object
    import timm

    return timm
