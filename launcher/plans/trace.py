"""What one rank's step costs, seen operation by operation: memory, arithmetic, traffic, messages.

Works on fake tensors, whose storages have sizes and no memory, and on real ones alike.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from parallel.traffic import Traffic

_aten = torch.ops.aten


class Trace(Traffic):
    """Inside, every operation is counted.

    live, peak: bytes of the storages that were made inside and are alive; at most.
    flops: of matrix products and attention, 2 per multiply-add.
    products: bytes that matrix products and attention read and write.
    touched: bytes that all operations do, if nothing is fused.
    """

    def __init__(self, axes: dict[str, str]):
        super().__init__(axes)
        self.live = self.peak = 0
        self.flops = 0
        self.products = self.touched = 0
        self._held: dict[int, tuple[Any, int]] = {}
        self._resize: Callable[..., Any] = torch.UntypedStorage.resize_

    def __enter__(self) -> Trace:
        trace, resize = self, self._resize

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            answer = resize(storage, size)
            trace._grow(storage)
            return answer

        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign, assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        outputs = list(_plain(result))
        if outputs and not func.is_view:  # asking a tensor for its device gives none
            touched = sum(map(_bytes, outputs)) + sum(map(_bytes, _plain((args, kwargs))))
            self.touched += touched
            packet = getattr(func, "_overloadpacket", None)
            if packet in _ATTENTION or packet in flop_registry:
                self.products += touched
                self.flops += (
                    _ATTENTION[packet](args)
                    if packet in _ATTENTION
                    else flop_registry[packet](*args, **(kwargs or {}), out_val=result)
                )
            for tensor in outputs:
                self._grow(tensor.untyped_storage())
        return result

    def _grow(self, storage: torch.UntypedStorage) -> None:
        """Count a storage at its present size, and forget it when it dies."""
        key, size = storage._cdata, storage.nbytes()
        held = self._held.get(key)
        if held is None:
            self._held[key] = (weakref.ref(storage, lambda _, k=key: self._drop(k)), size)  # type: ignore[misc]
            self.live += size
        else:
            self._held[key] = (held[0], size)
            self.live += size - held[1]
        self.peak = max(self.peak, self.live)

    def _drop(self, key: int) -> None:
        _, size = self._held.pop(key)
        self.live -= size


def _plain(values: Any) -> Iterator[Tensor]:
    """The tensors among values; of a DTensor, or one in flight, the tensor it wraps."""
    for value in tree_leaves(values):
        if isinstance(value, Tensor) and is_traceable_wrapper_subclass(value):
            names, _ = value.__tensor_flatten__()
            yield from _plain([getattr(value, name) for name in names])
        elif isinstance(value, Tensor):
            yield value


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _attention(args: Any) -> int:
    q, k, v = args[:3]
    return int(sdpa_flop_count(q.shape, _like(k, q), _like(v, q)))


def _attention_backward(args: Any) -> int:
    grad, q, k, v = args[:4]
    return int(sdpa_backward_flop_count(grad.shape, q.shape, _like(k, q), _like(v, q)))


def _like(k: Tensor, q: Tensor) -> tuple[int, ...]:
    """Grouped keys and values are read by every query head of their group."""
    return (*q.shape[:-2], *k.shape[-2:])


_ATTENTION: dict[Any, Callable[[Any], int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""The fused attention of CPUs, which PyTorch's own table of operations leaves out."""
