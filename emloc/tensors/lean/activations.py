"""What layers are computed again from, in host memory while it is not needed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

# What is smaller stays: a copy would take longer than its memory is worth.
SMALLEST = 2**20

# What waits, and the device and moment at which its copy is complete.
Waiting = tuple[Tensor, torch.device, torch.cuda.Event]


def offload_layer_inputs(model: nn.Module) -> None:
    """Let the input of every layer that is computed again wait in host memory.

    The copies run beside the computation; on the way back the layer waits for its own.
    """
    module: Any
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            again = getattr(module, "_gradient_checkpointing_func", None)
            if again is not None:
                module._gradient_checkpointing_func = partial(_offloaded, again)


def _offloaded(again: Callable[..., Any], *args: Any) -> Any:
    # Hooks of the recomputation itself are further in, and so in force within the layer.
    with saved_tensors_hooks(_to_host, _back):
        return again(*args)


def _to_host(tensor: Tensor) -> Any:
    if tensor.device.type not in ("cuda", "meta") or tensor.nbytes < SMALLEST:
        return tensor
    if tensor.is_meta:  # gone from the device that is planned for
        return tensor.shape, tensor.dtype
    beside = _stream(tensor.device)
    beside.wait_stream(torch.cuda.current_stream(tensor.device))
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    with torch.cuda.stream(beside):
        host.copy_(tensor, non_blocking=True)
        done = beside.record_event()
    tensor.record_stream(beside)
    return host, tensor.device, done


def _back(waiting: Any) -> Tensor:
    if isinstance(waiting, Tensor):
        return waiting
    if len(waiting) == 2:
        shape, dtype = waiting
        return torch.empty(shape, dtype=dtype, device="meta")
    host, device, done = waiting
    torch.cuda.current_stream(device).wait_event(done)
    return host.to(device, non_blocking=True)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
