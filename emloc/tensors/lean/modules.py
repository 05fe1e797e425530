"""Fused forwards for RMS norms and gated MLPs, which save fewer tensors for the backward pass.

Each replacement is tested first: for one module per class, its outputs on random inputs are
compared with those of the original forward. A class with differences beyond rounding is not
changed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from emloc.tensors.lean.kernels import liger
from emloc.tensors.nn.near import is_near

log = logging.getLogger(__name__)


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


def fuse_modules(model: nn.Module, dtype: torch.dtype, *, kernels: bool = False) -> list[str]:
    """Replace the forward of RMS norms and gated MLPs by fused ones, where the results are equal.

    Args:
        model: changed in place.
        dtype: the dtype that the model computes in.
        kernels: use the kernels of a library for GPUs, if it is installed.

    Returns:
        Names of the classes whose forward was replaced.
    """
    forwards: dict[type, Callable[..., Tensor] | None] = {}
    for module in model.modules():
        kind = type(module)
        if kind not in forwards:
            forwards[kind] = _fused_forward(module, dtype, _mlps(kernels=kernels))
        if (forward := forwards[kind]) is not None:
            module.forward = partial(forward, module)
    return [kind.__name__ for kind, forward in forwards.items() if forward is not None]


def _norm(norm: Any, hidden_states: Tensor) -> Tensor:
    """Fused forward of an RMS norm module."""
    return functional.rms_norm(hidden_states, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _mlp(gated_unit: Callable[[Tensor, Tensor], Tensor], mlp: Any, x: Tensor) -> Tensor:
    """Fused forward of a gated MLP module with SiLU activation."""
    return mlp.down_proj(gated_unit(mlp.gate_proj(x), mlp.up_proj(x)))


def _mlps(*, kernels: bool) -> list[Callable[..., Tensor]]:
    """Fused forwards of a gated MLP module, the best first."""
    own: Callable[[Tensor, Tensor], Tensor] = GatedUnit.apply
    library = liger() if kernels else None
    units = [own] if library is None else [library[0], own]
    return [partial(_mlp, unit) for unit in units]


def _fused_forward(
    module: nn.Module, dtype: torch.dtype, mlps: Sequence[Callable[..., Tensor]]
) -> Callable[..., Tensor] | None:
    """The first fused forward for a module with equal results; None if there is none."""
    forwards: Sequence[Callable[..., Tensor]] = [_norm]
    if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
        width = module.get_parameter("weight").shape[0]
    elif all(hasattr(module, part) for part in ("gate_proj", "up_proj", "down_proj")):
        gate: Any = module.get_submodule("gate_proj")
        forwards, width = mlps, gate.in_features
    else:
        return None
    # Packed layers have buffers, but no parameters.
    device = next(chain(module.parameters(), module.buffers())).device
    if device.type == "meta":
        return forwards[-1]  # a memory plan: the meta device has no numbers to compare
    generator = torch.Generator(device=device).manual_seed(0)
    trial = torch.randn(4, width, device=device, generator=generator).to(dtype)
    training = module.training
    module.train()  # so that dropout, which the fused forward lacks, shows as a difference
    with torch.no_grad():
        expected = module(trial)
        near = (one for one in forwards if _is_equal(partial(one, module), trial, expected))
        forward = next(near, None)
    module.train(training)
    return forward


def _is_equal(forward: Callable[[Tensor], Tensor], x: Tensor, expected: Tensor) -> bool:
    """Return whether a forward gives an expected output for x, up to rounding."""
    try:
        output = forward(x)
    except Exception as error:  # why: a kernel may not know a shape, or not be compiled here
        log.info("train: a kernel for gated MLPs does not work here: %s", error)
        return False
    return is_near(output, expected)
