"""Fused forwards for RMS norms and gated MLPs, which save fewer tensors for the backward pass.

Each replacement is tested first: for one module per class, its outputs on random inputs are
compared with those of the original forward. A class with differences beyond rounding is not
changed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# Relative difference that rounding to 16 bits can cause, with a margin.
ROUNDING = 0.01


class GatedUnit(torch.autograd.Function):
    """Computes silu(gate) * up and saves only these two inputs for the backward pass.

    The backward pass overwrites the memory of `up`, so no other code may use the inputs; here they
    are fresh outputs of two linear layers. A second backward pass through the same graph fails.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        """Return silu(gate) * up, elementwise, for tensors of any equal shape."""
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
    """Replace the forward of RMS norms and gated MLPs by fused ones, where the results are equal.

    Args:
        model: changed in place.
        dtype: the dtype that the model computes in.

    Returns:
        Names of the classes whose forward was replaced.
    """
    forwards: dict[type, Callable[..., Tensor] | None] = {}
    for module in model.modules():
        kind = type(module)
        if kind not in forwards:
            forwards[kind] = _fused_forward(module, dtype)
        if (forward := forwards[kind]) is not None:
            module.forward = partial(forward, module)
    return [kind.__name__ for kind, forward in forwards.items() if forward is not None]


def _norm(norm: Any, hidden_states: Tensor) -> Tensor:
    """Fused forward of an RMS norm module."""
    return functional.rms_norm(hidden_states, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _mlp(mlp: Any, x: Tensor) -> Tensor:
    """Fused forward of a gated MLP module with SiLU activation."""
    gated: Tensor = GatedUnit.apply(mlp.gate_proj(x), mlp.up_proj(x))  # type: ignore[no-untyped-call]
    return mlp.down_proj(gated)


def _fused_forward(module: nn.Module, dtype: torch.dtype) -> Callable[..., Tensor] | None:
    """The fused forward for a module, if there is one with equal results; else None."""
    forward: Callable[..., Tensor] = _norm
    if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
        width = module.get_parameter("weight").shape[0]
    elif all(hasattr(module, part) for part in ("gate_proj", "up_proj", "down_proj")):
        gate: Any = module.get_submodule("gate_proj")
        forward, width = _mlp, gate.in_features
    else:
        return None
    # Packed layers have buffers, but no parameters.
    device = next(chain(module.parameters(), module.buffers())).device
    if device.type == "meta":
        return forward  # a memory plan: the meta device has no numbers to compare
    generator = torch.Generator(device=device).manual_seed(0)
    trial = torch.randn(4, width, device=device, generator=generator).to(dtype)
    training = module.training
    module.train()  # so that dropout, which the fused forward lacks, shows as a difference
    with torch.no_grad():
        expected, fused = module(trial).float(), forward(module, trial).float()
    module.train(training)
    return forward if (fused - expected).norm() <= ROUNDING * expected.norm() else None
