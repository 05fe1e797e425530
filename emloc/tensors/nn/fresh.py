"""Run a newly initialised module, such as a classifier head, in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def compute_in_float32(module: nn.Module) -> None:
    """Convert a module to float32 and its inputs too, whatever the dtype of the rest of the model.

    The module is trained in full, and 16-bit weights would round typical optimizer steps away.
    """
    module.float()
    module.register_forward_pre_hook(_inputs_to_float32, with_kwargs=True)


def _inputs_to_float32(
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook that converts all floating-point inputs of a module to float32."""
    return tuple(map(_to_float32, args)), {name: _to_float32(x) for name, x in kwargs.items()}


def _to_float32(value: Any) -> Any:
    """A floating-point tensor in float32; any other value unchanged."""
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(torch.float32) if is_float else value
