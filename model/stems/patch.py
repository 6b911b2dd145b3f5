"""Patch embedding (Dosovitskiy et al. 2020, 2010.11929). Axes: B, C, H, W, T tokens, D width."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor

from core.errors import UserError
from core.registry import Slot, build, register
from model.leaves import Convolution
from model.stems.base import Grid, Stem, per_token, tokens


@register(
    "stem",
    "patch",
    paper="2010.11929",
    title="An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale",
    aliases=["patch_embedding"],
)
class PatchEmbedding(Stem):
    """Cuts an image into squares and projects each to the width.

    Args:
        patch: side of a patch in pixels; the image's sides must be multiples of it.
        norm: a norm after the projection, as in Swin.
        bias: a bias in the projection.
    """

    probe: ClassVar[dict[str, Any]] = {"patch": 4}

    def __init__(
        self,
        dim: int,
        channels: int = 3,
        *,
        patch: Annotated[int, Field(gt=0)] = 16,
        norm: Annotated[Any, Slot("norm", optional=True)] = None,
        bias: bool = True,
    ):
        super().__init__()
        self.patch = patch
        self.project = Convolution(channels, dim, patch, patch, bias=bias)
        self.norm = per_token(
            build("norm", norm, dim=dim) if norm is not None else None, "stem patch"
        )

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Grid]:
        self.grid(images_BCHW.shape[2], images_BCHW.shape[3])
        x_BTD, grid = tokens(self.project(images_BCHW))
        return (x_BTD if self.norm is None else self.norm(x_BTD)), grid

    def grid(self, rows: int, columns: int) -> Grid:
        if rows % self.patch or columns % self.patch:
            raise UserError(
                f"images of {rows}×{columns} pixels do not divide into patches of {self.patch}; "
                "resize them or set model.stem.patch to a divisor"
            )
        return rows // self.patch, columns // self.patch
