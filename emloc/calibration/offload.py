"""Where the tensors of suspended forward passes wait: host memory up to a limit, then disk.

A tensor is parked in place: the very object that the suspended frames hold is given other memory
(`tensor.data = ...`), so no frame keeps the device's alive, and on resuming it is given the
device's again. What moves is a whole storage with all its tensors, so those that share memory share
it afterwards too. A storage that anybody else refers to as well (a view of a parameter, a batch of
the caller's) stays where it is.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from emloc.errors import ConfigError
from emloc.runtime.memory import GIB


class OffloadPool:
    """The room that the passes of one walk share; `memory` and `disk` are the bytes in use."""

    def __init__(
        self, model: nn.Module, device: torch.device, limit: int | None, folder: Path | None
    ) -> None:
        """Room beside `device`: `limit` bytes of host memory (None: all there is), then files.

        The files are in `folder` (None: the system's for temporary ones) and have no name.
        """
        self.device = device
        self.memory = 0
        self.disk = 0
        self._limit = limit
        self._folder = folder or Path(tempfile.gettempdir())
        # Buffers, and tables that a module keeps to itself: other passes need them meanwhile.
        self._fixed = {id(one) for module in model.modules() for one in tensors_in(vars(module))}

    @property
    def mapped(self) -> bool:
        """Whether the device can work on what waits as it is: to a CPU a file is memory."""
        return self.device.type == "cpu"

    @property
    def idle(self) -> bool:
        """Whether everything may stay where it is: in host memory that has no limit."""
        return self.mapped and self._limit is None

    def movable(self, tensor: Tensor) -> bool:
        """Whether the tensor is memory of the device, and none of the model's."""
        return (
            tensor.device.type == self.device.type
            and tensor.layout is torch.strided
            and not any(
                isinstance(one, nn.Parameter) or id(one) in self._fixed
                for one in (tensor, tensor._base)
            )
        )

    def store(self, raw: Tensor) -> tuple[Tensor, bool]:
        """The bytes in host memory, or else in a file: which is said by the second value.

        Raises:
            ConfigError: there is no room for the file.
        """
        if self._limit is None or self.memory + raw.numel() <= self._limit:
            return raw.cpu(), False
        if raw.numel() > shutil.disk_usage(self._folder).free:
            raise ConfigError(
                f"{self._folder}: no room for {raw.numel() / GIB:.2g} GiB of hidden states, "
                f"{self.disk / GIB:.2g} are there; set budget.host_gib higher"
            )
        handle, path = tempfile.mkstemp(dir=self._folder)
        os.close(handle)
        file = torch.from_file(path, shared=True, size=raw.numel(), dtype=torch.uint8)
        os.unlink(path)
        return file.copy_(raw), True


class _StoredBytes(NamedTuple):
    """The bytes of one storage as they wait."""

    stored: Tensor  # (bytes,) uint8
    on_disk: bool
    versions: frozenset[int] | None  # of the storage's tensors when they were copied


class OffloadedTensors:
    """What one suspended pass has in the lot."""

    def __init__(self, lot: OffloadPool) -> None:
        self._lot = lot
        # By the address of the storage that the tensors have while the pass runs; they are kept
        # with it, so that no other storage can be given the address.
        self._waiting: dict[int, tuple[_StoredBytes, list[Tensor]]] = {}

    def park(self, tensors: Iterable[Tensor]) -> None:
        """Let the tensors wait; one that has not changed since it last did is not copied again.

        Raises:
            ConfigError: there is no room on the disk.
        """
        found = [one for one in tensors if self._lot.movable(one)]
        before = {key: copy for key, (copy, _) in self._leave().items()}
        alone = _alone(found, set(before) if self._lot.mapped else set())
        before = {key: copy for key, copy in before.items() if key in alone}
        for key, copy in before.items():
            if self._lot.mapped or copy.versions == _versions(alone[key]) is not None:
                self._enter(key, copy, alone.pop(key))
        before.clear()
        for key, aliases in alone.items():
            copy = _StoredBytes(*self._lot.store(_raw(aliases[0])), _versions(aliases))
            self._enter(_address(copy.stored) if self._lot.mapped else key, copy, aliases)

    def resume(self) -> None:
        """Give the tensors memory of the device again."""
        if self._lot.mapped:
            return
        waiting, self._waiting = self._waiting, {}
        for copy, tensors in waiting.values():
            here = copy.stored.to(self._lot.device)
            _point(tensors, here)
            self._waiting[_address(here)] = copy, tensors

    def end(self) -> None:
        """Nothing of this pass is needed any more."""
        self._leave()

    def _enter(self, key: int, copy: _StoredBytes, aliases: list[Tensor]) -> None:
        _point(aliases, copy.stored)
        self._waiting[key] = copy, aliases
        self._count(copy, 1)

    def _leave(self) -> dict[int, tuple[_StoredBytes, list[Tensor]]]:
        waiting, self._waiting = self._waiting, {}
        for copy, _ in waiting.values():
            self._count(copy, -1)
        return waiting

    def _count(self, copy: _StoredBytes, sign: int) -> None:
        if copy.on_disk:
            self._lot.disk += sign * copy.stored.numel()
        else:
            self._lot.memory += sign * copy.stored.numel()


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def _alone(tensors: Iterable[Tensor], ours: set[int]) -> dict[int, list[Tensor]]:
    """Address of a storage -> its tensors, where these are all there are.

    The storages in `ours` have one more that we hold ourselves.
    """
    groups: dict[int, dict[int, Tensor]] = {}
    for tensor in tensors:
        # A view keeps its base, and so the base's memory.
        for one in (tensor, tensor._base):
            if one is not None:
                groups.setdefault(_address(one), {})[id(one)] = one
    return {
        key: list(group.values())
        for key, group in groups.items()
        if _uses(next(iter(group.values()))) == len(group) + (key in ours)
    }


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _uses(tensor: Tensor) -> int:
    """How many tensors there are of this one's storage, whoever holds them."""
    storage = tensor.untyped_storage()  # one more user itself
    return int(torch._C._storage_Use_Count(storage._cdata)) - 1


def _raw(tensor: Tensor) -> Tensor:
    """All bytes of the tensor's storage as a tensor."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _point(tensors: Iterable[Tensor], memory: Tensor) -> None:
    """Give tensors of one storage that of `memory`, each at the place it has in its own."""
    for one in tensors:
        empty = torch.empty(0, dtype=one.dtype, device=memory.device)
        place = one.storage_offset(), one.shape, one.stride()
        one.data = empty.set_(memory.untyped_storage(), *place)


def _versions(tensors: Iterable[Tensor]) -> frozenset[int] | None:
    """Grows with every write through one of the tensors; None where torch does not count them."""
    tensors = list(tensors)
    if any(one.is_inference() for one in tensors):
        return None
    return frozenset(one._version for one in tensors)
