"""Put tensors and modules into a model by name."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor, nn


def put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Make `tensor` the frozen parameter called `name`.

    Raises:
        ValueError: its shape is not the parameter's.
    """
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if (shape := module.get_parameter(leaf).shape) != tensor.shape:
        raise ValueError(f"{name} has shape {tuple(shape)}, the checkpoint {tuple(tensor.shape)}")
    setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))


def with_modules(model: nn.Module, replace: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of `model` with the named modules replaced.

    All other parameters and buffers are shared with `model`, which stays as it is.
    """
    kept = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, memo=kept)
    for name, module in replace.items():
        twin.set_submodule(name, module)
    return twin
