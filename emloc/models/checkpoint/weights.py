"""Origins of a model's weights: files of a checkpoint, a random generator, or none."""

from __future__ import annotations

import mmap
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from emloc.errors import ConfigError, one_line
from emloc.models.checkpoint.files import (
    INDEX,
    SINGLE,
    StoredTensor,
    stored_tensors,
    weight_files,
)
from emloc.models.checkpoint.origins import Converted, Direct, Layout, Origin
from emloc.models.checkpoint.pinned import read_pinned


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

    def read_ahead(self, names: list[str], *, pinned: bool) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor in host memory) for parameters whose read waits for the disk.

        The tensors equal those of `read`. `pinned`: in pinned memory, for a copy to a GPU.
        """


@dataclass(frozen=True)
class SafetensorsWeights:
    """The weights in a checkpoint folder: one safetensors file, or several with an index."""

    folder: Path
    layout: Layout

    @property
    def description(self) -> str:
        """Path of the folder."""
        return str(self.folder)

    @property
    def names(self) -> Collection[str]:
        """Names of all parameters and persistent buffers in the files."""
        return self.origins.keys()

    @cached_property
    def files(self) -> list[Path]:
        """All files with weights.

        Raises:
            ConfigError: the folder has no safetensors file, or a shard is missing.
        """
        return weight_files(self.folder)

    @property
    def ignores_index(self) -> bool:
        """Whether one file holds all weights although there is an index of several."""
        return self.files == [self.folder / SINGLE] and (self.folder / INDEX).exists()

    @cached_property
    def stored(self) -> list[StoredTensor]:
        """All tensors in the files, from the headers of the files; of two namesakes the last.

        Raises:
            ConfigError: a file is missing or damaged.
        """
        tensors = (tensor for path in self.files for tensor in stored_tensors(path))
        return list({tensor.name: tensor for tensor in tensors}.values())

    @cached_property
    def origins(self) -> dict[str, Origin]:
        """Name of a parameter or buffer -> its origin in the files.

        Raises:
            ConfigError: a file is missing or damaged, or the tensors do not fit the model.
        """
        return self.layout(self.stored)

    def read(self, names: list[str], device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor on `device`), file by file; only one file is open at a time.

        Raises:
            ConfigError: stored tensors cannot be split or converted into the parameters.
        """
        # safetensors reads "cuda" as device 0, torch as the current device.
        device_with_index = str(torch.empty(0, device=device).device)
        direct, converted = self._by_origin(names)
        yield from _read_all_direct(direct, device_with_index)
        requested = set(names)
        for conversion in converted:
            yield from _read_converted(conversion, requested, device_with_index)

    def read_ahead(self, names: list[str], *, pinned: bool) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor in host memory) of parameters that the files store as they are.

        Parameters that are converted are not yielded, since another device may round in another
        way. Only the pages of their files are read, so that `read` does not wait for the disk.

        Raises:
            ConfigError: stored tensors cannot be split into the parameters.
        """
        direct, converted = self._by_origin(names)
        if pinned:
            whole = {name: origin.tensor for name, origin in direct if _is_whole(origin)}
            mapped = [(name, origin) for name, origin in direct if name not in whole]
            yield from read_pinned(whole, list(_read_all_direct(mapped, "cpu")))
        else:
            for name, tensor in _read_all_direct(direct, "cpu"):  # reads no page yet
                _read_pages(tensor)
                yield name, tensor
        for conversion in converted:
            for stored in _read_stored(conversion.inputs, "cpu"):
                _read_pages(stored)

    def _by_origin(self, names: Iterable[str]) -> tuple[list[tuple[str, Direct]], list[Converted]]:
        """Return the parameters that are stored as they are, and the conversions of the others."""
        direct: list[tuple[str, Direct]] = []
        converted: dict[int, Converted] = {}
        for name in names:
            origin = self.origins[name]
            if isinstance(origin, Direct):
                direct.append((name, origin))
            else:
                converted[id(origin)] = origin
        return direct, list(converted.values())


def _is_whole(origin: Direct) -> bool:
    """Return whether the bytes of a stored tensor are those of the parameter in torch."""
    return origin.part is None and origin.tensor.torch_dtype is not None


def _read_all_direct(
    parameters: Iterable[tuple[str, Direct]], device: str
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of parameters, file by file; only one file is open at a time."""
    by_file: dict[Path, list[tuple[str, Direct]]] = {}
    for name, origin in parameters:
        by_file.setdefault(origin.tensor.file, []).append((name, origin))
    for path, members in by_file.items():
        with safe_open(path, framework="pt", device=device) as file:
            for name, origin in members:
                yield name, _read_direct(file, origin)


def _read_pages(tensor: Tensor) -> None:
    """Read one byte of each page of a mapped tensor, so that the system reads it from disk."""
    tensor.flatten().view(torch.uint8)[:: mmap.PAGESIZE].sum()


def _read_direct(file: Any, origin: Direct) -> Tensor:
    """Read one parameter from an open safetensors file."""
    name = origin.tensor.name
    if origin.part is None:
        tensor: Tensor = file.get_tensor(name)
        return tensor
    # Only the parameter's rows are read: to read the whole fused tensor for each of q, k and v
    # would read every byte three times and need memory for all three.
    stored = file.get_slice(name)
    try:
        return origin.part.extract(stored, stored.get_shape()[0])
    except ValueError as error:
        raise _conversion_error(origin.tensor, error) from error


def _read_converted(
    origin: Converted, requested: Collection[str], device: str
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of the `requested` parameters that one conversion computes."""
    try:
        results = origin.compute(_read_stored(origin.inputs, device))
        values = [(name, results[name]) for name in origin.targets if name in requested]
    except (ValueError, RuntimeError, KeyError, StopIteration) as error:
        raise _conversion_error(origin.inputs[0], error) from error
    del results
    while values:
        yield values.pop(0)


def _read_stored(tensors: Iterable[StoredTensor], device: str) -> Iterator[Tensor]:
    """Yield stored tensors; only one file is open at a time."""
    for stored in tensors:
        with safe_open(stored.file, framework="pt", device=device) as file:
            yield file.get_tensor(stored.name)


def _conversion_error(stored: StoredTensor, error: Exception) -> ConfigError:
    """The error for a stored tensor that cannot be turned into the model's parameters."""
    reason = one_line(error)
    return ConfigError(
        f"{stored.file}: {stored.name}: {reason}; set model.source to another checkpoint"
    )


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

    def read_ahead(self, names: list[str], *, pinned: bool) -> Iterator[tuple[str, Tensor]]:
        """Yield nothing."""
        return iter(())
