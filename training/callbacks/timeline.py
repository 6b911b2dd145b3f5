"""One step recorded on every rank, for the picture of it in `manyforms report`."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from model.block import Block
from training.callbacks.base import Callback, Loop
from training.meter import memory
from training.timeline.messages import Axes, Watch
from training.timeline.spans import BLOCK, spans


class Timeline(Callback):
    """Writes `rank-K.json`: the step, the rank's place on every axis, and the step's spans.

    The recorded step is slower than others, by some microseconds an operation. The step before it
    is watched for the groups of its messages, unless blocks are compiled: a dispatch mode would
    have them run as they are written.

    Args:
        folder: made when there is something to write.
        at: the step, from 1.
        model: whole, before an engine prepares it; its blocks are found again by name.
    """

    def __init__(self, folder: Path, at: int, model: nn.Module):
        self.folder, self.at = folder, at
        named = [name for name, module in model.named_modules() if isinstance(module, Block)]
        self._number = {name: index for index, name in enumerate(named)}
        self._axes: Axes | None = None

    def around(self, trainer: Loop, logged: bool) -> AbstractContextManager[Any]:
        step = trainer.step + 1
        if step == self.at - 1 and dist.is_initialized() and not trainer.config.compile:
            self._axes = Axes(trainer.engine.layout)
            return Watch(self._axes)
        return self._record(trainer) if step == self.at else nullcontext()

    @contextmanager
    def _record(self, trainer: Loop) -> Iterator[None]:
        activities = [ProfilerActivity.CPU]
        if trainer.engine.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        trainer.engine.any(False)  # all ranks begin together, so that their clocks need not agree
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it prints when it starts and stops
        with (
            self._marked(trainer.engine.model),
            profile(activities=activities, record_shapes=True) as recorded,
        ):
            yield
            if trainer.engine.device.type == "cuda":
                torch.cuda.synchronize(trainer.engine.device)
        layout = trainer.engine.layout
        found = spans(_events(recorded), self._axes or Axes(layout))
        self.folder.mkdir(exist_ok=True)
        text = json.dumps(
            {
                "step": self.at,
                "rank": layout.rank,
                "world": layout.world,
                "place": {a: i for a, i in layout.coordinates.items() if getattr(layout, a) > 1},
                "device": trainer.engine.device.type,
                "memory": memory(trainer.engine.device),
                "spans": [span.plain() for span in found],
            }
        )
        path = self.folder / f"rank-{layout.rank}.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text + "\n", encoding="utf8")
        os.replace(temporary, path)

    @contextmanager
    def _marked(self, model: nn.Module) -> Iterator[None]:
        """Inside, every block's forward pass is marked in the trace with its number."""
        open_marks: list[Any] = []

        def enter(number: int) -> Any:
            def mark(*_: Any) -> None:
                open_marks.append(record_function(f"{BLOCK}{number}"))
                open_marks[-1].__enter__()

            return mark

        def leave(*_: Any) -> None:
            open_marks.pop().__exit__(None, None, None)

        hooks: list[Any] = []
        for name, module in model.named_modules():
            if name in self._number:
                hooks.append(module.register_forward_pre_hook(enter(self._number[name])))
                hooks.append(module.register_forward_hook(leave))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _events(recorded: profile) -> list[dict[str, Any]]:
    """The trace's events, through the file format that PyTorch documents."""
    with tempfile.TemporaryDirectory(prefix="manyforms-") as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf8"))["traceEvents"]
        return events
