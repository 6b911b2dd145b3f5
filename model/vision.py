"""Vision models: columnar, and hierarchical stages with a resampling step between.

Axes: B batch, C channels, H rows and W columns of pixels, P patches (tokens of the stem's grid),
T tokens (P and the prefix: class token, distillation token), D width, V classes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from core.config import Config
from core.errors import UserError
from core.registry import Slot, build
from model.block import Block, BlockConfig
from model.language import as_pattern
from model.leaves import IGNORE, Axis, Dropout, Replicated, leaves
from model.output import Batch, ModelOutput
from model.positions.base import position_for
from model.precision import at_least_float32
from model.stack import Stack
from model.stems.base import Grid, Stem
from model.stream import Stream
from model.units import Unit
from model.vision_heads import Classifier, Pool, Reconstruct, Reconstruction

_Positive = Annotated[int, Field(gt=0)]


class StageConfig(Config):
    """One stage of a hierarchical model."""

    dim: _Positive
    """Width D of the stage."""
    depth: _Positive
    """Blocks of the stage."""
    block: list[BlockConfig] | None = None
    """One block, or a list that repeats over the depth; the model's `block` if not given."""

    @field_validator("block", mode="before")
    @classmethod
    def _pattern(cls, value: Any) -> Any:
        return None if value is None else as_pattern(value)


class VisionConfig(Config):
    """A vision model: `dim` and `depth` for a columnar one, or `stages`."""

    kind: Literal["vision"] = "vision"
    image_size: _Positive | tuple[_Positive, _Positive] | Literal["from_data"] = "from_data"
    """Pixels of a side, or rows and columns."""
    channels: _Positive | Literal["from_data"] = "from_data"
    classes: _Positive | Literal["from_data"] | None = "from_data"
    """Classes V of the head; null for a model without one."""
    dim: _Positive | None = None
    """Width D of a columnar model; 192 if there are no stages."""
    depth: _Positive | None = None
    """Blocks of a columnar model; 12 if there are no stages."""
    block: list[BlockConfig] = [
        BlockConfig(norm="layernorm", position="learned", feedforward="mlp")
    ]
    """One block, or a list of blocks that repeats over the depth."""
    stages: list[StageConfig] | None = None
    """The stages of a hierarchical model, instead of `dim` and `depth`."""
    resample: Annotated[Any, Slot("resample")] = "patch_merging"
    """What leads from each stage to the next."""
    stem: Annotated[Any, Slot("stem")] = "patch"
    """From the image to tokens."""
    pool: Pool = "mean"
    """What the head reads: the class token, the mean over the image's tokens, or `distilled`, a
    class and a distillation token with a head each, whose logits are averaged (2012.12877)."""
    pool_norm: Annotated[Any, Slot("norm", optional=True)] = None
    """A norm after pooling, in place of the last norm over the tokens."""
    head_bias: bool = True
    embedding_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    reconstruct: Reconstruct | None = None
    """Masked image modelling: `pixels` (SimMIM's absolute error, 2111.09886) or
    `normalised_pixels` (MAE's squared error of pixels normalised per patch, 2111.06377); adds a
    mask token and a head."""
    init: Annotated[Any, Slot("init")] = "truncated_normal"

    @field_validator("block", mode="before")
    @classmethod
    def _pattern(cls, value: Any) -> Any:
        return as_pattern(value)

    @model_validator(mode="after")
    def _shape(self) -> VisionConfig:
        if self.stages is not None and not self.stages:
            raise ValueError("stages: a hierarchical model needs at least one")
        if self.stages and (self.dim or self.depth):
            raise ValueError("give either dim and depth, or stages, not both")
        if self.stages and len(self.stages) > 1 and self.pool != "mean":
            raise ValueError(f"pool: '{self.pool}' needs a columnar model; use mean with stages")
        return self

    @property
    def layout(self) -> list[StageConfig]:
        """The stages; a columnar model is one."""
        return self.stages or [StageConfig(dim=self.dim or 192, depth=self.depth or 12)]


class Stage(nn.Module):
    """The resampling from the stage before, if any, and a stack: Stream → Stream.

    The resampler works inside the region: on all tokens, alike on every rank.
    """

    def __init__(self, stack: Stack, resample: nn.Module | None):
        super().__init__()
        self.axis = Axis()
        self.resample = resample
        for _, leaf in leaves(resample) if resample is not None else ():
            leaf.inside = True
        self.stack = stack

    def enter(self, stream: Stream) -> Stream:
        """The stream on this stage's grid. What blocks carried belongs to the stage before."""
        if self.resample is None:
            return stream
        stream = stream.copy()
        x_BTD, grid = self.resample(self.axis.ops.enter(stream.hidden), stream.grid)
        stream.hidden, stream.grid = self.axis.ops.leave_alike(x_BTD), grid
        stream.carried = {}
        return stream

    def forward(self, stream: Stream) -> Stream:
        out: Stream = self.stack(self.enter(stream))
        return out


class VisionModel(nn.Module):
    """Images → logits or losses. Build it with `model.zoo.build_model`.

    `forward(batch)` takes `images` BCHW, and optionally `targets` B (−100 is not counted), for
    which it returns losses beside the logits, or `mask` BP bool (True: hidden from the model), for
    which it returns the reconstruction's loss per image.
    """

    here = True
    """Whether all its blocks are on this rank; an engine that cuts the model says no."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        if "from_data" in (config.image_size, config.channels, config.classes):
            raise UserError(
                "model.image_size, model.channels and model.classes must be numbers to build a "
                "model without data; set them, e.g. model.image_size=224 model.channels=3 "
                "model.classes=1000"
            )
        assert config.image_size != "from_data" and config.channels != "from_data"
        assert config.classes != "from_data"
        self.config, self.init = config, config.init
        size = config.image_size
        self.image_size = (size, size) if isinstance(size, int) else size
        layout = config.layout
        self.depth = sum(stage.depth for stage in layout)
        dim = layout[0].dim
        self.axis = Axis()
        self.stem: Stem = build("stem", config.stem, dim=dim, channels=config.channels)
        grid = self.stem.grid(*self.image_size)
        self.grid, self.patches = grid, grid[0] * grid[1]
        prefix = {"class_token": 1, "distilled": 2, "mean": 0}[config.pool]
        self.prefix = Replicated(prefix, dim) if prefix else None
        self.mask_token = Replicated(dim) if config.reconstruct else None
        context: dict[str, Any] = {"causal": False}
        self.position = position_for(
            "input",
            (layout[0].block or config.block)[0].position,
            **context,
            dim=dim,
            grid=grid,
            max_length=prefix + self.patches,
        )
        self.dropout = Dropout(config.embedding_dropout)

        self.stages = nn.ModuleList()
        offset, before = 0, dim
        for index, stage in enumerate(layout):
            resample = None
            if index:
                resample = build("resample", config.resample, dim=before, dim_out=stage.dim)
                grid = resample.grid(grid)
            last = index == len(layout) - 1
            tokens = prefix + grid[0] * grid[1]
            stack = Stack(
                stage.block or config.block,
                stage.depth,
                {**context, "dim": stage.dim, "grid": grid, "max_length": tokens},
                offset=offset,
                total=self.depth,
                final_norm=None if last and config.pool_norm is None else False,
            )
            self.stages.append(Stage(stack, resample))
            offset, before = offset + stage.depth, stage.dim

        self.head = self.reconstruction = None
        if config.classes is not None:
            self.head = Classifier(
                before, config.classes, config.pool, config.head_bias, config.pool_norm
            )
        if config.reconstruct is not None:
            self.reconstruction = Reconstruction(
                before, config.channels, self.image_size, self.grid, grid, config.reconstruct
            )

    def forward(self, batch: Batch) -> ModelOutput:
        stream = self.embed(batch)
        for stage in self.stages:
            stream = stage(stream)
        return self.finish(stream, batch)

    def embed(self, batch: Batch) -> Stream:
        """The stream that enters the first block."""
        x_BTD, grid = self.stem(batch["images"])
        if grid != self.grid and (self.position is not None or self.reconstruction is not None):
            rows, columns = batch["images"].shape[2:]
            raise UserError(
                f"images of {rows}×{columns} pixels, but this model is for "
                f"{self.image_size[0]}×{self.image_size[1]}: resize them or set model.image_size"
            )
        if "mask" in batch:
            if self.mask_token is None:
                raise UserError("masked images need model.reconstruct, e.g. normalised_pixels")
            hidden_BP1 = batch["mask"][..., None]
            x_BTD = torch.where(hidden_BP1, self.mask_token().to(x_BTD.dtype), x_BTD)
        if self.prefix is not None:
            prefix = self.prefix().to(x_BTD.dtype)
            x_BTD = torch.cat((prefix.expand(x_BTD.shape[0], -1, -1), x_BTD), dim=1)
        if self.position is not None:
            x_BTD = self.position.embed(x_BTD, None)
        return Stream(self.dropout(self.axis.ops.shard_sequence(x_BTD)), grid=grid)

    def finish(self, stream: Stream, batch: Batch) -> ModelOutput:
        """Logits, and the losses of targets; with a mask, the reconstruction's losses instead."""
        losses = logits = None
        if "mask" in batch:
            assert self.reconstruction is not None  # `embed` has refused the batch
            losses = self.reconstruction.loss(stream.hidden, batch["images"], batch["mask"])
        elif self.head is not None:
            logits = self.head(stream.hidden)
            if "targets" in batch:
                losses = F.cross_entropy(
                    at_least_float32(logits),
                    batch["targets"],
                    ignore_index=IGNORE,
                    reduction="none",
                )
        elif "targets" in batch:
            raise UserError("targets need a head: set model.classes")
        return ModelOutput(losses, logits, stream.losses, stream.metrics, stream)

    def units(self) -> list[Unit]:
        """The steps before `finish`."""
        names = ("stem", "prefix", "mask_token", "position")
        opening = tuple(name for name in names if getattr(self, name) is not None)
        found = [Unit(opening, lambda _, batch: self.embed(batch))]
        for index, stage in enumerate(self.stages):
            assert isinstance(stage, Stage)
            first, *others = stage.stack.units(f"stages.{index}.stack")
            if stage.resample is not None:
                first = first.after(stage.enter, (f"stages.{index}.resample",))
            found += [first, *others]
        return found

    def ending(self) -> tuple[str, ...]:
        """The names of the modules that `finish` calls."""
        return tuple(name for name in ("head", "reconstruction") if getattr(self, name) is not None)

    def example(self) -> Batch:
        """A batch of one sample on the meta device."""
        channels = self.config.channels
        assert isinstance(channels, int)
        return {"images": torch.empty(1, channels, *self.image_size, device="meta")}

    def features(self, batch: Batch) -> list[tuple[Tensor, Grid]]:
        """Before the last norm: each stage's tokens [B, rows·columns, D] and grid.

        A columnar model gives those of each block; the prefix is left out.
        """
        found: list[tuple[Tensor, Grid]] = []
        stream = self.embed(batch)
        for stage in self.stages:
            assert isinstance(stage, Stage)
            stream = stage.stack.begin(stage.enter(stream))
            for index, block in enumerate(stage.stack.blocks):
                assert isinstance(block, Block)
                stream = block(stream)
                if len(self.stages) == 1 or index == len(stage.stack.blocks) - 1:
                    whole = stream.copy()
                    block.residuals[-1].finish(whole)
                    assert whole.grid is not None
                    x_BTD = self.axis.ops.enter(whole.hidden)
                    found.append((x_BTD[:, -whole.grid[0] * whole.grid[1] :], whole.grid))
            stream = stage.stack.finish(stream)
        return found
