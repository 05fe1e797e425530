"""Replace parameters and modules of a model by name."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def replace_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace the buffer called `name` by `tensor`, or the parameter by a frozen one that holds it.

    Raises:
        ValueError: the shapes of the two tensors differ.
    """
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    current = getattr(module, leaf)
    if current.shape != tensor.shape:
        raise ValueError(
            f"{name} has shape {tuple(current.shape)} in the model, but {tuple(tensor.shape)} in "
            "the checkpoint"
        )
    is_parameter = isinstance(current, nn.Parameter)
    setattr(module, leaf, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)


def with_modules(
    model: nn.Module, replace: Mapping[str, nn.Module], *, share: bool = True
) -> nn.Module:
    """Return a copy of `model` in which the named modules are replaced; `model` does not change.

    Args:
        model: the model to copy.
        replace: name of a module -> its replacement.
        share: whether the copy's other parameters use the memory of the model's. They are frozen
            parameters of the copy's own, so that to cast or move the copy does not change `model`.
            Buffers are always copied.
    """
    memo: dict[int, Any] = {id(model.get_submodule(name)): new for name, new in replace.items()}
    if share:
        memo |= {id(parameter): alias_of(parameter) for parameter in model.parameters()}
    return copy.deepcopy(model, memo=memo)


def alias_of(tensor: Tensor) -> nn.Parameter:
    """Return a new frozen parameter that uses the memory of `tensor`."""
    return nn.Parameter(tensor.detach(), requires_grad=False)
