"""Origins of a model's weights: safetensors files, a random generator, or none."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from emloc.errors import ConfigError
from emloc.models.checkpoint.damaged import check_safetensors, read_index, unfinished_download
from emloc.models.checkpoint.fused_tensors import Layout, TensorSlice

# Start of a tensor name in the files of vision-language models -> start of the parameter name. The
# files keep the old names, before transformers moved language model and vision tower to `model`.
_RENAMINGS = (
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^language_model\.model\."), "model.language_model."),
    (re.compile(r"^(vision_tower|multi_modal_projector)\."), r"model.\1."),
)


class Weights(Protocol):
    """The weights of a model, by parameter name."""

    @property
    def description(self) -> str:
        """Origin of the weights for error messages, such as the checkpoint's folder."""

    @property
    def names(self) -> Collection[str]:
        """Names of all parameters with weights.

        Raises:
            ConfigError: the weights cannot be read.
        """

    def read(self, names: list[str], device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor on `device`) for the named parameters, one tensor at a time."""


def parameter_name(stored: str) -> str:
    """The model's name of the parameter that a file stores as `stored`."""
    for pattern, name in _RENAMINGS:
        stored = pattern.sub(name, stored)
    return stored


def native_layout(stored: str) -> dict[str, TensorSlice | None]:
    """Map a tensor name in transformers' own checkpoints to parameter names (all its rows).

    Releases of transformers differ: some put the parts of a vision tower below `vision_model`. Both
    names are returned then, and a model has one of them.
    """
    name = parameter_name(stored)
    return dict.fromkeys((name, name.replace(".vision_tower.vision_model.", ".vision_tower.")))


def layout_of(model: PreTrainedModel) -> Layout:
    """The layout of checkpoints that `from_pretrained` reads for this class of models.

    Two more kinds of names than in `native_layout` are recognised: names of earlier releases, which
    transformers renames, and names without the base model's prefix, from a checkpoint that was
    saved without a head.
    """
    parameters = dict(model.named_parameters())
    conversions = get_model_conversion_mapping(model)
    renamings = [item for item in conversions if isinstance(item, WeightRenaming)]

    def layout(stored: str) -> dict[str, TensorSlice | None]:
        """Map the name of a stored tensor to parameter names."""
        names = native_layout(stored)
        if parameters.keys().isdisjoint(names):
            name, _ = rename_source_key(stored, renamings, [], model.base_model_prefix, parameters)
            names = {name: None} if name in parameters else names
        return names

    return layout


@dataclass(frozen=True)
class TensorLocation:
    """Location of a parameter: file, tensor in the file, and rows of the tensor."""

    file: Path
    stored: str  # name of the tensor in the file
    part: TensorSlice | None  # None: all rows


@dataclass(frozen=True)
class SafetensorsWeights:
    """The weights in a checkpoint folder: one safetensors file, or several with an index."""

    folder: Path
    layout: Layout = native_layout

    @property
    def description(self) -> str:
        """Path of the folder."""
        return str(self.folder)

    @property
    def names(self) -> Collection[str]:
        """Names of all parameters in the files."""
        return self._locations.keys()

    @cached_property
    def files(self) -> dict[str, Path]:
        """Parameter name -> file that contains the parameter."""
        return {name: location.file for name, location in self._locations.items()}

    @cached_property
    def _locations(self) -> dict[str, TensorLocation]:
        """Parameter name -> location of the parameter.

        Raises:
            ConfigError: the folder has no safetensors file, or a shard is missing.
        """
        index = self.folder / "model.safetensors.index.json"
        single = self.folder / "model.safetensors"
        if index.exists():
            stored = read_index(index)
            shards = set(stored.values())
            missing = sorted(file for file in shards if not (self.folder / file).exists())
            if missing:
                raise ConfigError(
                    f"{self.folder}: shard {missing[0]} is missing"
                    f"{unfinished_download(self.folder)}; "
                    "set model.source to a complete checkpoint"
                )
            for file in sorted(shards):
                check_safetensors(self.folder / file)
        elif single.exists():
            check_safetensors(single)
            with safe_open(single, framework="pt") as opened:
                stored = dict.fromkeys(opened.keys(), single.name)
        else:
            raise ConfigError(
                f"{self.folder}: no model.safetensors{unfinished_download(self.folder)}; "
                "set model.source to a checkpoint folder"
            )
        return {
            name: TensorLocation(self.folder / file, tensor, part)
            for tensor, file in stored.items()
            for name, part in self.layout(tensor).items()
        }

    def read(self, names: list[str], device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor on `device`), file by file; only one file is open at a time.

        Raises:
            ConfigError: a fused tensor has a shape that cannot be split into its parameters.
        """
        # safetensors reads "cuda" as device 0, torch as the current device.
        device_with_index = str(torch.empty(0, device=device).device)
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._locations[name].file, []).append(name)
        for path, members in by_file.items():
            with safe_open(path, framework="pt", device=device_with_index) as file:
                for name in members:
                    yield name, _read_tensor(file, self._locations[name])


def _read_tensor(file: Any, location: TensorLocation) -> Tensor:
    """Read one parameter from an open safetensors file."""
    if location.part is None:
        tensor: Tensor = file.get_tensor(location.stored)
        return tensor
    # Only the parameter's rows are read: to read the whole fused tensor for each of q, k and v
    # would read every byte three times and need memory for all three.
    stored = file.get_slice(location.stored)
    try:
        return location.part.extract(stored, stored.get_shape()[0])
    except ValueError as error:
        raise ConfigError(
            f"{location.file}: {location.stored}: {error}; set model.source to another checkpoint"
        ) from error


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


@dataclass(frozen=True)
class AbsentWeights:
    """Placeholder for the weights of a model that is only used to plan memory and time."""

    description: str

    @property
    def names(self) -> Collection[str]:
        """Fail, because the model has no weights.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"{self.description}: only its shape is known here; "
            "set model.source=/path/to/checkpoint or model.weights=random"
        )

    def read(self, names: list[str], device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """Fail, because the model has no weights.

        Raises:
            ConfigError: always.
        """
        return iter([(name, torch.empty(0)) for name in self.names])


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
