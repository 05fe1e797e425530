"""Random weights: values that are generated again from a seed at every read."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class TensorInit:
    """Distribution of a random tensor: normal with `mean` and `std`; constant if `std` is 0."""

    shape: tuple[int, ...]
    mean: float
    std: float


@dataclass(frozen=True)
class RandomWeights:
    """Random weights, generated again from the seed and the parameter's name at every read.

    Random generators of CPU and GPU give different values. All values are therefore drawn on
    `device_type` and then moved, so that they do not depend on the device that reads them.
    """

    seed: int
    inits: Mapping[str, TensorInit]
    dtype: torch.dtype
    device_type: str  # cpu | cuda

    @property
    def description(self) -> str:
        """The words "random weights" with the seed."""
        return f"random weights of seed {self.seed}"

    @property
    def names(self) -> Collection[str]:
        """Names of all parameters of the model; tied parameters appear once."""
        return self.inits.keys()

    def read(self, names: list[str], device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, random tensor on `device`); torch's global random state is not changed."""
        same_type = device.type == self.device_type
        draw_device = device if same_type else torch.device(self.device_type)
        for name in names:
            yield name, self._random_tensor(name, draw_device).to(device)

    def read_ahead(self, names: list[str], *, pinned: bool) -> Iterator[tuple[str, Tensor]]:
        """Yield nothing, since no value comes from the disk."""
        return iter(())

    def _random_tensor(self, name: str, device: torch.device) -> Tensor:
        """The values of the parameter `name`, drawn on `device`."""
        init = self.inits[name]
        if not init.std:
            return torch.full(init.shape, init.mean, dtype=self.dtype, device=device)
        text = f"{self.seed}:{name}".encode()
        seed = int.from_bytes(hashlib.sha256(text).digest()[:8]) >> 1  # torch's seeds are signed
        generator = torch.Generator(device).manual_seed(seed)
        tensor = torch.empty(init.shape, dtype=self.dtype, device=device)
        return tensor.normal_(init.mean, init.std, generator=generator)


def random_device_type() -> str:
    """Type of the device that draws random weights: `cuda` if this machine has a GPU, or `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def tensor_inits(model: PreTrainedModel) -> dict[str, TensorInit]:
    """Parameter name -> distribution of its initial values in a new model.

    Matrices, embeddings and convolutions are normal with the configuration's `initializer_range`
    (0.02 by default), biases are zero, layer scales are `layer_scale_init_value` (0.1 by default).
    All other vectors are weights of norms and are one. Tied parameters appear once.
    """
    submodel_configs = {
        name: module.config
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel)
    }
    return {
        name: _tensor_init(name, parameter, submodel_configs[_innermost(name, submodel_configs)])
        for name, parameter in model.named_parameters()
    }


def _innermost(name: str, submodels: Collection[str]) -> str:
    """The longest name in `submodels` of a submodel that contains `name`; '' is the whole model."""
    return max((sub for sub in submodels if not sub or name.startswith(f"{sub}.")), key=len)


def _tensor_init(name: str, parameter: nn.Parameter, config: object) -> TensorInit:
    """Distribution of one parameter's initial values, by its name, rank and configuration."""
    shape = tuple(parameter.shape)
    leaf = name.rpartition(".")[2]
    if "lambda" in leaf:
        return TensorInit(shape, float(getattr(config, "layer_scale_init_value", 0.1)), 0.0)
    if leaf == "bias":
        return TensorInit(shape, 0.0, 0.0)
    if parameter.ndim == 1:
        return TensorInit(shape, 1.0, 0.0)
    return TensorInit(shape, 0.0, float(getattr(config, "initializer_range", 0.02)))
