"""Activation offloading: inputs of checkpointed layers wait in host memory."""

from __future__ import annotations

from collections.abc import Callable
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
    stream = _copy_stream(tensor.device)
    stream.wait_stream(torch.cuda.current_stream(tensor.device))
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    with torch.cuda.stream(stream):
        host.copy_(tensor, non_blocking=True)
        copied = stream.record_event()
    tensor.record_stream(stream)
    return host, tensor.device, copied


def _to_device(saved: Any) -> Tensor:
    """Return the tensor that `_to_host` saved, on the device it came from."""
    if isinstance(saved, Tensor):
        return saved
    if len(saved) == 2:
        shape, dtype = saved
        return torch.empty(shape, dtype=dtype, device="meta")
    host, device, copied = saved
    torch.cuda.current_stream(device).wait_event(copied)
    return host.to(device, non_blocking=True)


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The CUDA stream for copies from `device`, created once."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
