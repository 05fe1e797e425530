"""Replace parameters and modules of a model by name."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor, nn


def replace_parameter(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace the parameter called `name` by a frozen one that holds `tensor`.

    Raises:
        ValueError: the shapes of tensor and parameter differ.
    """
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if (shape := module.get_parameter(leaf).shape) != tensor.shape:
        raise ValueError(
            f"{name} has shape {tuple(shape)} in the model, but {tuple(tensor.shape)} in the "
            "checkpoint"
        )
    setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))


def replace_buffer(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace the buffer called `name` by `tensor`.

    Raises:
        ValueError: the shapes of tensor and buffer differ.
    """
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if (shape := module.get_buffer(leaf).shape) != tensor.shape:
        raise ValueError(
            f"{name} has shape {tuple(shape)} in the model, but {tuple(tensor.shape)} in the "
            "checkpoint"
        )
    setattr(module, leaf, tensor)


def with_modules(model: nn.Module, replace: Mapping[str, nn.Module]) -> nn.Module:
    """Return a copy of `model` in which the named modules are replaced.

    The copy shares all other parameters and buffers with `model`, which does not change.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, memo=shared)
    for name, module in replace.items():
        twin.set_submodule(name, module)
    return twin
