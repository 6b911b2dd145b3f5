"""The names of parts that an override leaves out: `train.optimizer.lr=0.01` alone means the default
optimizer with another rate."""

from __future__ import annotations

from typing import Any

from core.config import Config
from core.registry import PartConfig, Slot
from launcher.options import sections


def fill_names(model: type[Config], data: Any) -> None:
    """Give every mapping that stands for a part and has no name its default's, in place."""
    if isinstance(data, list):
        for item in data:
            fill_names(model, item)
    if not isinstance(data, dict):
        return
    for name, field in model.model_fields.items():
        value = data.get(field.alias or name)
        is_part = any(isinstance(item, Slot) for item in field.metadata)
        if is_part and isinstance(value, dict) and "name" not in value:
            default = field.get_default(call_default_factory=True)
            default = default.name if isinstance(default, PartConfig) else default
            if isinstance(default, str):
                data[field.alias or name] = {"name": default, **value}
        for section in sections(field.annotation):
            fill_names(section, value)
