"""Activation offloading: inputs of checkpointed layers wait in host memory.

All of this can be recorded as a part of a CUDA graph, with which only memory that is there already
can be used. So the pinned memory is kept, and a tensor stays alive until its copy is complete.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

# Bytes: smaller tensors stay on the device, since a copy costs more than their memory is worth.
MIN_BYTES = 2**20


def offload_layer_inputs(model: nn.Module) -> None:
    """Offload the input of every checkpointed layer to host memory until the backward pass.

    The copies run on a separate CUDA stream, parallel to the computation. In the backward pass, the
    input of one layer comes back while the layer behind it is computed.
    """
    module: Any
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            checkpoint = getattr(module, "_gradient_checkpointing_func", None)
            if checkpoint is not None:
                module._gradient_checkpointing_func = partial(_with_offloading, checkpoint)


def _with_offloading(checkpoint: Callable[..., Any], *args: Any) -> Any:
    """Call a checkpointing function so that the tensors it saves are offloaded."""
    # The hooks of the checkpointing function are nested inside these and apply within the layer,
    # so only the layer's inputs are offloaded.
    with saved_tensors_hooks(_to_host, _to_device):
        return checkpoint(*args)


def _to_host(tensor: Tensor) -> Any:
    """Start to copy a large CUDA tensor to pinned host memory; return what `_to_device` needs."""
    if tensor.device.type not in ("cuda", "meta") or tensor.nbytes < MIN_BYTES:
        return tensor
    if tensor.is_meta:  # a memory plan: the tensor no longer counts for the device
        return tensor.shape, tensor.dtype
    return _copies_of(tensor.device).store(tensor.contiguous())


def _to_device(saved: Any) -> Tensor:
    """Return the tensor that `_to_host` saved, on the device it came from."""
    if isinstance(saved, Tensor):
        return saved
    if isinstance(saved, tuple):
        shape, dtype = saved
        return torch.empty(shape, dtype=dtype, device="meta")
    host: HostCopy = saved
    return _copies_of(host.device).load(host)


@dataclass(eq=False)
class HostCopy:
    """A tensor in pinned host memory, or on its way back."""

    buffer: Tensor | None  # (bytes,) uint8, at least as large as the tensor; None: it was read
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device  # that the tensor came from
    copied: torch.cuda.Event
    back: tuple[Tensor, torch.cuda.Event] | None = None  # the tensor on the device, and when

    def view(self, buffer: Tensor) -> Tensor:
        """Return the part of a buffer that holds the tensor."""
        size = self.shape.numel() * self.dtype.itemsize
        return buffer[:size].view(self.dtype).view(self.shape)


class HostCopies:
    """Copies between a device and pinned host memory, on a stream of their own.

    The computation waits for the copy of a layer's input when the next layer begins. The memory of
    the input is free then. Inputs are needed again in the reverse order, so each comes back while
    the computation uses the one behind it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._free: list[Tensor] = []
        self._last: tuple[Tensor, torch.cuda.Event] | None = None
        self._coming: HostCopy | None = None  # on its way back
        self._order = LastFirst()

    def store(self, tensor: Tensor) -> HostCopy:
        """Begin to copy a contiguous tensor to the host."""
        self._wait_for_last()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        buffer = self._take(tensor.nbytes)
        with torch.cuda.stream(self._stream):
            host = HostCopy(buffer, tensor.shape, tensor.dtype, tensor.device, torch.cuda.Event())  # type: ignore[no-untyped-call]
            host.view(buffer).copy_(tensor, non_blocking=True)
            host.copied.record(self._stream)
        self._last = tensor, host.copied
        self._order.add(host)
        return host

    def load(self, host: HostCopy) -> Tensor:
        """Return a tensor on the device, once, and begin to copy the one that was stored before."""
        self._wait_for_last(host)
        tensor, done = host.back or self._fetch(host)
        host.back = None
        torch.cuda.current_stream(self._device).wait_event(done)
        self._coming = self._order.take(host)
        if self._coming is not None:
            self._coming.back = self._fetch(self._coming)
        return tensor

    def _fetch(self, host: HostCopy) -> tuple[Tensor, torch.cuda.Event]:
        """Begin to copy a tensor back; return it with the event behind the copy."""
        buffer, host.buffer = host.buffer, None
        assert buffer is not None  # a second backward pass
        tensor = torch.empty(host.shape, dtype=host.dtype, device=self._device)
        # Operations that used this memory before come first.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            tensor.copy_(host.view(buffer), non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._stream)
        self._free.append(buffer)  # the next copy into it comes behind this one, on the same stream
        return tensor, done

    def _wait_for_last(self, host: HostCopy | None = None) -> None:
        """Let the computation wait for copies whose memory may be free now."""
        current = torch.cuda.current_stream(self._device)
        if self._last is not None:
            current.wait_event(self._last[1])
            self._last = None
        coming, self._coming = self._coming, None
        if coming is not None and coming is not host and coming.back is not None:
            current.wait_event(coming.back[1])

    def _take(self, size: int) -> Tensor:
        """Return the smallest free buffer of at least `size` bytes, or a new one."""
        fitting = [index for index, one in enumerate(self._free) if one.numel() >= size]
        if fitting:
            return self._free.pop(min(fitting, key=lambda index: self._free[index].numel()))
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)


class LastFirst:
    """The copies that nobody has taken yet, in the order of their storage.

    A copy is forgotten when nothing else refers to it.
    """

    def __init__(self) -> None:
        self._copies: list[ReferenceType[HostCopy]] = []

    def add(self, host: HostCopy) -> None:
        """Add a copy behind all others."""
        self._copies.append(ref(host))

    def take(self, host: HostCopy) -> HostCopy | None:
        """Remove a copy, and return the one that was stored before it, unless it is on its way."""
        alive = [copy for one in self._copies if (copy := one()) is not None]
        index = next((i for i, one in enumerate(alive) if one is host), 0)
        self._copies = [ref(one) for one in alive if one is not host]
        before = alive[index - 1] if index else None
        return before if before is not None and before.buffer is not None else None


@cache
def _copies_of(device: torch.device) -> HostCopies:
    """The copies from and to a device, which all models share."""
    return HostCopies(device)
