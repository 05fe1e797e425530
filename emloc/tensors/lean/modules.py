"""Norms and gated MLPs with fewer operations and nothing kept that can be had again.

A replacement is tried out first: one module of each class on random numbers against its own
forward. What differs by more than rounding stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# Relative difference that rounding to 16 bits explains, with room.
ROUNDING = 0.01


class GatedUnit(torch.autograd.Function):
    """silu(gate) * up; keeps its two inputs and nothing else, and ends with up's gradient in place.

    So the inputs must be nobody else's: here they come straight out of two layers. A second
    backward pass through the same graph fails.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        """Elementwise, any shape."""
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of gate and up."""
        gate, up = ctx.saved_tensors
        (dy,) = grads
        d_up = functional.silu(gate).mul_(dy)
        d_gate = up.mul_(dy)
        torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
        return d_gate, d_up


def fuse_modules(model: nn.Module, dtype: torch.dtype) -> list[str]:
    """Give norms and gated MLPs a shorter forward; the names of the classes that have one now.

    `dtype` is what the model computes in.
    """
    chosen: dict[type, Callable[..., Tensor] | None] = {}
    for module in model.modules():
        kind = type(module)
        if kind not in chosen:
            chosen[kind] = _shorter(module, dtype)
        if (forward := chosen[kind]) is not None:
            module.forward = partial(forward, module)
    return [kind.__name__ for kind, forward in chosen.items() if forward is not None]


def _norm(own: Any, hidden_states: Tensor) -> Tensor:
    return functional.rms_norm(hidden_states, own.weight.shape, own.weight, own.variance_epsilon)


def _mlp(own: Any, x: Tensor) -> Tensor:
    gated: Tensor = GatedUnit.apply(own.gate_proj(x), own.up_proj(x))  # type: ignore[no-untyped-call]
    return own.down_proj(gated)


def _shorter(module: nn.Module, dtype: torch.dtype) -> Callable[..., Tensor] | None:
    """The replacement of a module's forward, if there is one that gives the same."""
    forward: Callable[..., Tensor] = _norm
    if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
        width = module.get_parameter("weight").shape[0]
    elif all(hasattr(module, part) for part in ("gate_proj", "up_proj", "down_proj")):
        gate: Any = module.get_submodule("gate_proj")
        forward, width = _mlp, gate.in_features
    else:
        return None
    # Packed layers hold buffers alone.
    device = next(chain(module.parameters(), module.buffers())).device
    if device.type == "meta":
        return forward  # there are no numbers to compare; the device that is planned for has them
    source = torch.Generator(device=device).manual_seed(0)
    trial = torch.randn(4, width, device=device, generator=source).to(dtype)
    training = module.training
    module.train()  # or a dropout would not show
    with torch.no_grad():
        expected, found = module(trial).float(), forward(module, trial).float()
    module.train(training)
    return forward if (found - expected).norm() <= ROUNDING * expected.norm() else None
