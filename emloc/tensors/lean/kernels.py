"""Kernels of the library Liger, each for several operations of torch, on a GPU.

They are used where the library is installed and gives the results of the operations that they
replace, up to rounding.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from emloc.tensors.nn.near import is_near

log = logging.getLogger(__name__)

# Name of the function of a module of transformers that rotates queries and keys.
ROTARY = "apply_rotary_pos_emb"

# Types of devices that have the kernels.
DEVICES = ("cuda",)

# Returns silu(gate) * up.
GatedUnit = Callable[[Tensor, Tensor], Tensor]
# Returns queries and keys (B, heads, L, d) turned by their positions, of cosines and sines.
Rotary = Callable[..., tuple[Tensor, Tensor]]


@cache
def liger() -> tuple[GatedUnit, Rotary] | None:
    """Return the library's gated unit and rotation; None, with a log line, if it is missing.

    Both overwrite their inputs: the unit in the backward pass, the rotation in the forward pass.
    """
    try:
        from liger_kernel.ops.rope import LigerRopeFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except Exception as error:  # why: it imports Triton, which fails in many ways
        log.info("train: a step has more operations than with Liger's kernels: %s", error)
        return None
    return LigerSiLUMulFunction.apply, LigerRopeFunction.apply


class CheckedRotary:
    """The rotation of a module of transformers, by a kernel if it gives the same results.

    The first call compares both. A call with further arguments, or away from a GPU, is the
    module's own.
    """

    def __init__(self, own: Rotary, kernel: Rotary) -> None:
        self._own, self._kernel = own, kernel
        self._is_equal: bool | None = None

    def __call__(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the turned queries and keys."""
        if args or options or q.device.type not in DEVICES:
            return self._own(q, k, cos, sin, *args, **options)
        if self._is_equal is None:
            self._is_equal = self._compare(q, k, cos, sin)
        return (self._kernel if self._is_equal else self._own)(q, k, cos, sin)

    @torch.no_grad()
    def _compare(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
        expected = self._own(q, k, cos, sin)
        try:
            actual = self._kernel(q.clone(), k.clone(), cos, sin)
        except Exception as error:  # why: a kernel may not know a shape, or not be compiled here
            log.info("train: positions are applied by transformers: %s", error)
            return False
        return all(map(is_near, actual, expected))


@contextmanager
def fused_rotary(decoder: nn.Module) -> Iterator[None]:
    """Let the attention modules of a decoder turn queries and keys by a kernel in the block."""
    kernels = liger()
    modules = {sys.modules[type(module).__module__] for module in decoder.modules()}
    own = {module: vars(module)[ROTARY] for module in modules if ROTARY in vars(module)}
    if kernels is not None:
        for module, function in own.items():
            setattr(module, ROTARY, CheckedRotary(function, kernels[1]))
    try:
        yield
    finally:
        for module, function in own.items():
            setattr(module, ROTARY, function)
