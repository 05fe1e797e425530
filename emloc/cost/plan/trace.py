"""What one training step holds on the device, found by running it without any numbers.

The model's own code, PEFT's and ours run on the meta device, where a tensor has a shape and no
storage; every allocation and release is counted. So nothing about an architecture is written down
here, and what is lean in the real step is lean in this one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface

# The CUDA allocator hands out multiples of this.
GRAIN = 512
# Kernels that fill as much as their input takes while they run, which no operation tells of.
BESIDE = {torch.ops.aten.logsumexp.default}


@dataclass(frozen=True)
class TraceResult:
    """Bytes held at most beyond what was there before, and the operations dispatched."""

    peak: int
    operations: int


def trace(step: Callable[[], Any]) -> TraceResult:
    """Run `step` on meta tensors and count what it holds."""
    with _fused_norm(), _Counter() as counter:
        step()
    return TraceResult(counter.peak, counter.operations)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts storages from the operation that makes them to the death of their last tensor."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = self.peak = self.operations = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(_storage(one)) for one in tree_leaves((args, kwargs)) if _is_tensor(one)}
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        if func in BESIDE:
            self.peak = max(self.peak, self.held + args[0].nbytes)
        for one in tree_leaves(result):
            if _is_tensor(one):
                self._count(_storage(one), before)
        return result

    def _count(self, storage: Any, before: set[int]) -> None:
        key = id(storage)
        if key in self._known or key in before:
            return
        size = -(-storage.nbytes() // GRAIN) * GRAIN
        self._known.add(key)
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.held -= size


def _is_tensor(item: Any) -> bool:
    return isinstance(item, Tensor)


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()


@contextmanager
def _fused_norm() -> Iterator[None]:
    """Norms hold memory as the device's fused kernel does, not as the meta device decomposes them.

    A function mode would do, but is gone while the backward pass recomputes a layer.
    """
    own = functional.rms_norm

    def traced(x: Tensor, _: Any, weight: Tensor, *__: Any) -> Tensor:
        y: Tensor = _Norm.apply(x, weight)  # type: ignore[no-untyped-call]
        return y

    functional.rms_norm = traced  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.rms_norm = own


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """transformers' attention function: heads (batch, heads, length, d) to (batch, length, ...)."""
    output: Tensor = _Attention.apply(query, key, value)  # type: ignore[no-untyped-call]
    return output.transpose(1, 2).contiguous(), None


# A name transformers knows no mask for, since a mask would have to look at numbers.
ATTENTION = "emloc_traced"
AttentionInterface.register(ATTENTION, attention)


class _Attention(torch.autograd.Function):
    """Keeps query, key, value, output and one number a row; its backward a float32 accumulator."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        rows = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, rows)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        wide = query.new_empty(query.shape, dtype=torch.float32)
        found = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        del wide
        return found


class _Norm(torch.autograd.Function):
    """Keeps its input and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return torch.empty_like(ctx.saved_tensors[0]), None
