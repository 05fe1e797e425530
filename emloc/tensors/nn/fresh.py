"""A module made new beside a checkpoint's, as the head of a classifier."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def compute_in_float32(module: nn.Module) -> None:
    """Hold and compute a module in float32, whatever the dtype of the model around it.

    It is trained itself: in 16 bits a usual step is lost in the rounding of its weights.
    """
    module.float()
    module.register_forward_pre_hook(_widen, with_kwargs=True)


def _widen(
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tuple(map(_wide, args)), {name: _wide(one) for name, one in kwargs.items()}


def _wide(value: Any) -> Any:
    widens = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(torch.float32) if widens else value
