"""Other people's implementations, imported for comparison."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

import pytest
import torch

_declared: list[torch.library.Library] = []


def import_timm() -> ModuleType:
    """timm, or a skipped test where it is not installed."""
    return _import("timm", "timm")


def import_transformers(module: str = "transformers") -> ModuleType:
    """transformers, or a module of it; a skipped test where it is not installed."""
    return _import("transformers", module)


def _import(distribution: str, module: str) -> ModuleType:
    if importlib.util.find_spec(distribution) is None:
        pytest.skip(f"{distribution} is not installed; `make venv` installs it")
    _make_torchvision_importable()
    return importlib.import_module(module)


def _make_torchvision_importable() -> None:
    """Both libraries import torchvision where it is installed."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        # torchvision's CUDA build cannot load its operators beside a CPU build of torch, and then
        # trips over describing two of them. The models compared use none, so a declaration is
        # enough.
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)  # the declaration ends with the object
