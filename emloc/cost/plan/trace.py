"""Trace the memory of a training step by running it on the meta device.

On the meta device a tensor has a shape and no data. The code of the model, of PEFT and of this
package runs there, and every allocation and release is counted. So this module needs no knowledge
of an architecture, and memory that the real step saves is saved in the trace, too.
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

# Bytes that the CUDA allocator rounds every allocation up to.
ALLOCATION_UNIT = 512
# Operations whose kernels allocate a buffer as large as their input, unseen by the dispatcher.
BUFFERED_OPERATIONS = {torch.ops.aten.logsumexp.default}


@dataclass(frozen=True)
class TraceResult:
    """Peak of the bytes that a step allocates, and the number of operations that it dispatches."""

    peak: int
    operations: int


def trace(step: Callable[[], Any]) -> TraceResult:
    """Run `step` on meta tensors and count the memory that it allocates."""
    with _fused_norm(), _Counter() as counter:
        step()
    return TraceResult(counter.peak, counter.operations)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Dispatch mode that counts a storage from its creation until its last tensor is freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.in_use = self.peak = self.operations = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {id(_storage(leaf)) for leaf in tree_leaves((args, kwargs)) if _is_tensor(leaf)}
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        if func in BUFFERED_OPERATIONS:
            self.peak = max(self.peak, self.in_use + args[0].nbytes)
        for leaf in tree_leaves(result):
            if _is_tensor(leaf):
                self._count(_storage(leaf), inputs)
        return result

    def _count(self, storage: Any, inputs: set[int]) -> None:
        """Count a storage that is neither counted yet nor one of the operation's inputs."""
        key = id(storage)
        if key in self._counted or key in inputs:
            return
        size = -(-storage.nbytes() // ALLOCATION_UNIT) * ALLOCATION_UNIT
        self._counted.add(key)
        self.in_use += size
        self.peak = max(self.peak, self.in_use)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        """Subtract a storage that has been freed."""
        self._counted.discard(key)
        self.in_use -= size


def _is_tensor(item: Any) -> bool:
    return isinstance(item, Tensor)


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()


@contextmanager
def _fused_norm() -> Iterator[None]:
    """Let RMS norms allocate as the GPU's fused kernel does; the meta device decomposes them.

    A TorchFunctionMode is no alternative, since it is inactive while the backward pass recomputes a
    layer.
    """
    original = functional.rms_norm

    def rms_norm(x: Tensor, _: Any, weight: Tensor, *__: Any) -> Tensor:
        y: Tensor = _Norm.apply(x, weight)  # type: ignore[no-untyped-call]
        return y

    functional.rms_norm = rms_norm  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.rms_norm = original


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """Attention function for transformers that allocates as flash attention does.

    Query, key and value are (batch, heads, length, d); the output is (batch, length, heads, d).
    """
    output: Tensor = _Attention.apply(query, key, value)  # type: ignore[no-untyped-call]
    return output.transpose(1, 2).contiguous(), None


# transformers has no mask function for this name, so it builds no mask, which would need values.
ATTENTION = "emloc_traced"
AttentionInterface.register(ATTENTION, attention)


class _Attention(torch.autograd.Function):
    """Attention that saves its operands, its output and a float32 per row for the backward pass.

    The backward pass allocates a float32 accumulator of the query's shape.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        rows = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, rows)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        accumulator = query.new_empty(query.shape, dtype=torch.float32)
        gradients = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        del accumulator
        return gradients


class _Norm(torch.autograd.Function):
    """RMS norm that saves its input and one float32 per row for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return torch.empty_like(ctx.saved_tensors[0]), None
