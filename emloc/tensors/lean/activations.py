"""Activation offloading: inputs of checkpointed layers wait in host memory.

All of this can be recorded as a part of a CUDA graph, with which only memory that is there already
can be used. So the pinned memory is kept, and a tensor stays alive until its copy is complete.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

# Bytes: smaller tensors stay on the device, since a copy costs more than their memory is worth.
MIN_BYTES = 2**20


def offload_layer_inputs(model: nn.Module) -> None:
    """Offload the input of every checkpointed layer to host memory until the backward pass.

    The copies to the host run on a separate CUDA stream, parallel to the computation. In the
    backward pass, a layer waits until its own copy is complete.
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


@dataclass
class HostCopy:
    """A tensor in pinned host memory."""

    buffer: Tensor | None  # (bytes,) uint8, at least as large as the tensor; None: it was read
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device  # that the tensor came from
    copied: torch.cuda.Event

    def view(self, buffer: Tensor) -> Tensor:
        """Return the part of a buffer that holds the tensor."""
        size = self.shape.numel() * self.dtype.itemsize
        return buffer[:size].view(self.dtype).view(self.shape)


class HostCopies:
    """Copies between a device and pinned host memory, on a stream of their own.

    The computation waits for the copy of a layer's input when the next layer begins. The memory of
    the input is free then.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._free: list[Tensor] = []
        self._last: tuple[Tensor, torch.cuda.Event] | None = None

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
        return host

    def load(self, host: HostCopy) -> Tensor:
        """Copy a tensor back to the device, once."""
        self._wait_for_last()
        torch.cuda.current_stream(self._device).wait_event(host.copied)
        buffer, host.buffer = host.buffer, None
        assert buffer is not None  # a second backward pass
        tensor = host.view(buffer).to(self._device, non_blocking=True)
        self._free.append(buffer)  # the next copy into it waits for this one
        return tensor

    def _wait_for_last(self) -> None:
        if self._last is not None:
            torch.cuda.current_stream(self._device).wait_event(self._last[1])
            self._last = None

    def _take(self, size: int) -> Tensor:
        """Return the smallest free buffer of at least `size` bytes, or a new one."""
        fitting = [index for index, one in enumerate(self._free) if one.numel() >= size]
        if fitting:
            return self._free.pop(min(fitting, key=lambda index: self._free[index].numel()))
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)


@cache
def _copies_of(device: torch.device) -> HostCopies:
    """The copies from and to a device, which all models share."""
    return HostCopies(device)
