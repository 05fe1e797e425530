"""Where a model's tensors come from: a folder of safetensors, a seed, or nowhere."""

from __future__ import annotations

import hashlib
import json
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
from emloc.models.checkpoint.fused_tensors import Layout, TensorSlice

# The start of a name in the files of vision-language models -> what the module is called. The
# files keep the layout from before language model and vision tower were put below `model`.
_RENAMED = (
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^language_model\.model\."), "model.language_model."),
    (re.compile(r"^(vision_tower|multi_modal_projector)\."), r"model.\1."),
)


class Weights(Protocol):
    """Tensors by the name of the parameter they belong to."""

    @property
    def where(self) -> str:
        """What a message about them begins with."""

    @property
    def names(self) -> Collection[str]:
        """Every tensor there is.

        Raises:
            ConfigError: they cannot be read at all.
        """

    def read(self, names: list[str], device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """The named tensors, one at a time, each on `device` as soon as it is read."""


def parameter_name(stored: str) -> str:
    """What the model calls a tensor that a file calls `stored`."""
    for pattern, name in _RENAMED:
        stored = pattern.sub(name, stored)
    return stored


def native(stored: str) -> dict[str, TensorSlice | None]:
    """The layout of transformers' own checkpoints: a tensor is a parameter, if by another name.

    Some releases have the parts of a vision tower below `vision_model`, and others not, whatever
    the file says: then both names are given, of which a model has one.
    """
    name = parameter_name(stored)
    return dict.fromkeys((name, name.replace(".vision_tower.vision_model.", ".vision_tower.")))


def layout_of(model: PreTrainedModel) -> Layout:
    """The layout of checkpoints that `from_pretrained` reads for that class of model.

    Beside `native`, a tensor may have a name of an earlier release, which transformers renames, or
    one that begins below the head, where the checkpoint was saved without one.
    """
    own = dict(model.named_parameters())
    conversions = get_model_conversion_mapping(model)
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]

    def layout(stored: str) -> dict[str, TensorSlice | None]:
        names = native(stored)
        if own.keys().isdisjoint(names):
            name, _ = rename_source_key(stored, renamings, [], model.base_model_prefix, own)
            names = {name: None} if name in own else names
        return names

    return layout


@dataclass(frozen=True)
class TensorLocation:
    """Where a parameter lies: in which file, in which tensor, and in which rows of it."""

    file: Path
    stored: str
    part: TensorSlice | None  # None: all of it


@dataclass(frozen=True)
class SafetensorsWeights:
    """The tensors of a checkpoint folder, one file or several with an index."""

    folder: Path
    layout: Layout = native

    @property
    def where(self) -> str:
        """The folder."""
        return str(self.folder)

    @property
    def names(self) -> Collection[str]:
        """Every parameter in the files."""
        return self._places.keys()

    @cached_property
    def files(self) -> dict[str, Path]:
        """Parameter name -> the file that holds it."""
        return {name: place.file for name, place in self._places.items()}

    @cached_property
    def _places(self) -> dict[str, TensorLocation]:
        """Parameter name -> where it lies.

        Raises:
            ConfigError: no safetensors in the folder, or a shard is missing.
        """
        index = self.folder / "model.safetensors.index.json"
        single = self.folder / "model.safetensors"
        if index.exists():
            stored: dict[str, str] = json.loads(index.read_text())["weight_map"]
            lost = sorted({file for file in stored.values() if not (self.folder / file).exists()})
            if lost:
                raise ConfigError(f"{self.folder}: shard {lost[0]} is missing; set model.source")
        elif single.exists():
            with safe_open(single, framework="pt") as file:
                stored = dict.fromkeys(file.keys(), single.name)
        else:
            raise ConfigError(f"{self.folder}: no model.safetensors; set model.source to one")
        return {
            name: TensorLocation(self.folder / file, tensor, part)
            for tensor, file in stored.items()
            for name, part in self.layout(tensor).items()
        }

    def read(self, names: list[str], device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """The named tensors file by file, each file closed after its last.

        Raises:
            ConfigError: a tensor that holds several parameters cannot be divided into them.
        """
        # "cuda" means the first device to a file, and the current one to torch.
        there = str(torch.empty(0, device=device).device)
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._places[name].file, []).append(name)
        for path, members in by_file.items():
            with safe_open(path, framework="pt", device=there) as file:
                for name in members:
                    yield name, _tensor(file, self._places[name])


def _tensor(file: Any, place: TensorLocation) -> Tensor:
    """One parameter out of an open file."""
    if place.part is None:
        whole: Tensor = file.get_tensor(place.stored)
        return whole
    # Run by run: q, k and v of one tensor together read each byte once, and no more than what was
    # asked for is ever held, where whole reads would fetch all of it three times.
    stored = file.get_slice(place.stored)
    try:
        return place.part.of(stored, stored.get_shape()[0])
    except ValueError as error:
        raise ConfigError(f"{place.file}: {place.stored}: {error}; set model.source") from error


@dataclass(frozen=True)
class TensorInit:
    """How one random tensor is made: `mean` everywhere, plus normal noise of `std`."""

    shape: tuple[int, ...]
    mean: float
    std: float


@dataclass(frozen=True)
class RandomWeights:
    """Tensors made from a seed and their name whenever they are asked for, and never stored.

    They are drawn on `home` and moved from there, so that a tensor is the same wherever it is
    read: the generators of a CPU and of a GPU give different numbers.
    """

    seed: int
    draws: Mapping[str, TensorInit]
    dtype: torch.dtype
    home: str  # cpu | cuda

    @property
    def where(self) -> str:
        """The seed."""
        return f"random weights of seed {self.seed}"

    @property
    def names(self) -> Collection[str]:
        """Every parameter of the model, tied ones once."""
        return self.draws.keys()

    def read(self, names: list[str], device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """The named tensors in the model's dtype; torch's own random numbers are left alone."""
        at = device if device.type == self.home else torch.device(self.home)
        for name in names:
            yield name, self._drawn(name, at).to(device)

    def _drawn(self, name: str, device: torch.device) -> Tensor:
        draw = self.draws[name]
        if not draw.std:
            return torch.full(draw.shape, draw.mean, dtype=self.dtype, device=device)
        text = f"{self.seed}:{name}".encode()
        own = int.from_bytes(hashlib.sha256(text).digest()[:8]) >> 1  # seeds are signed
        generator = torch.Generator(device).manual_seed(own)
        tensor = torch.empty(draw.shape, dtype=self.dtype, device=device)
        return tensor.normal_(draw.mean, draw.std, generator=generator)


@dataclass(frozen=True)
class AbsentWeights:
    """The weights of a model that is only planned with: none can be read."""

    where: str

    @property
    def names(self) -> Collection[str]:
        """There are none.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"{self.where}: only its shape is known here; set model.source=/path/to/checkpoint "
            "or model.weights=random"
        )

    def read(self, names: list[str], device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """Nothing.

        Raises:
            ConfigError: always.
        """
        return iter([(name, torch.empty(0)) for name in self.names])


def random_home() -> str:
    """The kind of device that random weights are drawn on: the one that this machine runs on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def draws_of(model: PreTrainedModel) -> dict[str, TensorInit]:
    """Parameter name -> how it starts in a fresh model of that kind.

    Matrices, embeddings and convolutions are normal with the configuration's `initializer_range`
    (0.02 where it has none), biases zero, layer scales `layer_scale_init_value` (0.1), and every
    other vector, which is a norm's weight, one. Tied parameters are there once.
    """
    parts = {
        name: module.config
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel)
    }
    return {
        name: _draw(name, parameter, parts[_innermost(name, parts)])
        for name, parameter in model.named_parameters()
    }


def _innermost(name: str, parts: Collection[str]) -> str:
    """The longest of the module names that `name` lies in; the whole model is called ''."""
    return max((part for part in parts if not part or name.startswith(f"{part}.")), key=len)


def _draw(name: str, parameter: nn.Parameter, config: object) -> TensorInit:
    shape = tuple(parameter.shape)
    leaf = name.rpartition(".")[2]
    if "lambda" in leaf:
        return TensorInit(shape, float(getattr(config, "layer_scale_init_value", 0.1)), 0.0)
    if leaf == "bias":
        return TensorInit(shape, 0.0, 0.0)
    if parameter.ndim == 1:
        return TensorInit(shape, 1.0, 0.0)
    return TensorInit(shape, 0.0, float(getattr(config, "initializer_range", 0.02)))
