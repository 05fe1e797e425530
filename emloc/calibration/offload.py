"""Offload the tensors of suspended forward passes: to host memory up to a limit, then to disk.

Passes stay on the device as long as their tensors fit into a limit of their own. From a GPU, copies
go to pinned memory, so that the program goes on meanwhile. They are made on the stream of the
computation: it frees the device memory behind each, and restores a tensor behind its copy.

A tensor is offloaded in place: the tensor object that the suspended frames hold gets other memory
(`tensor.data = ...`). So no frame keeps device memory alive, and `restore` gives the object device
memory again. A storage is always moved as a whole together with all its tensors, so that tensors
which share memory still share it afterwards. A storage that somebody else refers to as well (a view
of a parameter, a batch of the caller) stays on the device.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from emloc.calibration.pinned_pieces import PinnedPieces, piece_bytes
from emloc.config.settings import Budget
from emloc.errors import ConfigError
from emloc.runtime.memory import GIB

# Parts of a device of which hidden states take one at most.
_DEVICE_PARTS = 64


@dataclass(frozen=True)
class StateLimits:
    """Most memory for the tensors of suspended forward passes, in bytes; the rest goes to disk."""

    device: int = 0  # beside one pass, which is always there; of no effect on a CPU
    host: int | None = None  # None: no limit

    @property
    def halved(self) -> StateLimits:
        """The limits of each of two models whose passes are suspended at the same time."""
        return StateLimits(self.device // 2, None if self.host is None else self.host // 2)

    def device_share(self, size: int) -> int:
        """How many of `size` bytes of tensors stay on the GPU that they come from."""
        return min(size, self.device)

    def host_share(self, size: int) -> int:
        """How many of `size` bytes of tensors lie in host memory, if they come from a GPU."""
        beyond = size - self.device_share(size)
        return beyond if self.host is None else min(beyond, self.host)

    def disk_share(self, size: int) -> int:
        """How many of `size` bytes of tensors lie on the disk, if they come from a GPU."""
        return size - self.device_share(size) - self.host_share(size)


UNLIMITED = StateLimits()


def state_limits(budget: Budget, device_bytes: float) -> StateLimits:
    """The limits that the budget of a run sets, on a device of `device_bytes`; 0 for a CPU.

    States take a 64th of a device at most, so that they leave room for a model that just fits.
    """
    on_device = min(budget.gpu_states_gib * GIB, device_bytes / _DEVICE_PARTS)
    return StateLimits(int(on_device), int(budget.host_gib * GIB))


class OffloadPool:
    """Memory and disk for the tensors of all suspended forward passes over one model.

    `kept` (on the device), `memory` (of the host) and `disk` are the bytes in use.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, limits: StateLimits, folder: Path | None
    ) -> None:
        """Prepare to offload from `device` within the limits.

        The files lie in `folder` (None: the system's temporary folder) without a name, so that they
        vanish with the process.
        """
        self.device = device
        self.kept = 0
        self.memory = 0
        self.disk = 0
        self._limits = limits
        self._pieces = PinnedPieces(pinned=device.type == "cuda")
        self._folder = folder or Path(tempfile.gettempdir())
        # Buffers, and tables that modules hold as attributes: the other passes use them meanwhile.
        # They are kept here, or a new tensor could get the id of one that the model has dropped.
        self._model_tensors = {
            id(tensor): tensor
            for module in model.modules()
            for tensor in tensors_in(vars(module))
            if not isinstance(tensor, nn.Parameter)
        }

    @property
    def is_directly_usable(self) -> bool:
        """Whether the device computes on offloaded tensors without a copy, as a CPU does.

        Files are mapped into memory, so this holds for them too.
        """
        return self.device.type == "cpu"

    @property
    def is_idle(self) -> bool:
        """Whether offloading has no effect: a CPU model with no limit on host memory."""
        return self.is_directly_usable and self._limits.host is None

    def has_room(self, size: int) -> bool:
        """Whether `size` more bytes may stay on the device."""
        return not self.is_directly_usable and self.kept + size <= self._limits.device

    def is_movable(self, tensor: Tensor) -> bool:
        """Whether the tensor can be offloaded: dense, on the device, and not part of the model."""
        return (
            tensor.device.type == self.device.type
            and tensor.layout is torch.strided
            and not any(
                isinstance(owner, nn.Parameter) or id(owner) in self._model_tensors
                for owner in (tensor, tensor._base)
            )
        )

    def store(self, storage_bytes: Tensor, *, is_outer: bool = False) -> tuple[Tensor, bool]:
        """Copy bytes off the device; return the copy and whether the copy is a file.

        Outer tensors take half of the host memory at most: the others are copied more often.

        Raises:
            ConfigError: the disk has no space for the file.
        """
        size = self.host_bytes(storage_bytes)
        limit = self._limits.host
        if limit is None or self.memory + size <= limit // (2 if is_outer else 1):
            if self.is_directly_usable:
                return storage_bytes, False
            copy = self._pieces.take(storage_bytes.numel())
            return copy.copy_(storage_bytes, non_blocking=True), False
        if storage_bytes.numel() > shutil.disk_usage(self._folder).free:
            raise ConfigError(
                f"{self._folder}: the disk has no space for {storage_bytes.numel() / GIB:.2g} GiB "
                f"of hidden states, {self.disk / GIB:.2g} GiB are stored already; "
                "set budget.host_gib higher"
            )
        handle, path = tempfile.mkstemp(dir=self._folder)
        os.close(handle)
        file = torch.from_file(path, shared=True, size=storage_bytes.numel(), dtype=torch.uint8)
        os.unlink(path)
        return file.copy_(storage_bytes), True

    def fetch(self, stored: Tensor) -> Tensor:
        """Return a copy of stored bytes on the device."""
        return stored.to(self.device, non_blocking=True)

    def host_bytes(self, storage_bytes: Tensor) -> int:
        """Bytes of host memory that a copy takes."""
        size = storage_bytes.numel()
        return size if self.is_directly_usable else piece_bytes(size)

    def close(self) -> None:
        """Free the memory, when all passes have ended."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        self._pieces.close()


class _StorageCopy(NamedTuple):
    """The offloaded copy of one storage."""

    stored: Tensor  # (bytes,) uint8
    on_disk: bool
    versions: frozenset[int] | None  # versions of the storage's tensors when they were copied


_Offloaded = tuple[_StorageCopy, list[Tensor]]  # a copy, and the tensors that use it


class OffloadedTensors:
    """The offloaded tensors of one suspended forward pass, stored in a pool."""

    def __init__(self, pool: OffloadPool) -> None:
        self._pool = pool
        # Address of the storage that the tensors have while the pass runs -> copy and tensors. The
        # tensors keep that storage alive, so no other storage can get the same address.
        self._copies: dict[int, _Offloaded] = {}
        self._outer: list[_Offloaded] = []  # stay off the device while others are restored
        self._kept = 0  # bytes that stay on the device while the pass is suspended

    def offload(self, tensors: Iterable[Tensor], outer: Iterable[Tensor] = ()) -> None:
        """Move tensors off the device, unless there is room on it for all of them.

        A tensor that is unchanged since its last copy is not copied again. The `outer` ones, which
        only code around the loop over the blocks needs, go first and can be left behind. To a CPU
        all are alike.

        Raises:
            ConfigError: the disk has no space.
        """
        tensors, outer = list(tensors), list(outer)
        if self._pool.is_directly_usable:
            tensors, outer = tensors + outer, []
        candidates = [tensor for tensor in tensors + outer if self._pool.is_movable(tensor)]
        copies = {key: copy for key, (copy, _) in self._pop_copies().items()}
        own_keys = set(copies) if self._pool.is_directly_usable else set()
        groups = _unshared_storages(candidates, own_keys)
        if self._stay(groups.values()):
            return
        needed = {id(owner) for tensor in tensors for owner in (tensor, tensor._base)}
        outer_keys = [key for key, group in groups.items() if needed.isdisjoint(map(id, group))]
        if self._stay(group for key, group in groups.items() if key not in outer_keys):
            groups = {key: groups[key] for key in outer_keys}
        copies = {
            key: copy
            for key, copy in copies.items()
            if key in groups and self._is_current(copy, groups[key])
        }
        # Unchanged ones first, so that the pool knows how much memory is in use.
        for key in [*copies, *(key for key in groups if key not in copies)]:
            aliases, is_outer = groups[key], key in outer_keys
            copy = copies.get(key) or self._copied(aliases, is_outer=is_outer)
            _set_storage(aliases, copy.stored)
            self._count_bytes(copy, 1)
            if is_outer:
                self._outer.append((copy, aliases))
            else:
                new_key = _address(copy.stored) if self._pool.is_directly_usable else key
                self._copies[new_key] = copy, aliases

    def restore(self, *, outer: bool = True) -> None:
        """Move the offloaded tensors back to the device, with `outer` those of outer code, too."""
        if self._pool.is_directly_usable:
            return
        self._keep(0)
        copies, self._copies = [*self._copies.values()], {}
        if outer:
            copies, self._outer = [*copies, *self._outer], []
        for copy, tensors in copies:
            on_device = self._pool.fetch(copy.stored)
            _set_storage(tensors, on_device)
            self._copies[_address(on_device)] = copy, tensors

    def release(self) -> None:
        """Drop the copies, since the forward pass has ended."""
        self._keep(0)
        self._pop_copies()
        for copy, _ in self._outer:
            self._count_bytes(copy, -1)
        self._outer = []

    def _stay(self, groups: Iterable[list[Tensor]]) -> bool:
        """Leave the storages of some tensors on the device; return whether it has room for them."""
        size = sum(aliases[0].untyped_storage().nbytes() for aliases in groups)
        has_room = self._pool.has_room(size)
        if has_room:
            self._keep(size)
        return has_room

    def _keep(self, size: int) -> None:
        """Count the bytes of the pass that stay on the device while it is suspended."""
        self._pool.kept += size - self._kept
        self._kept = size

    def _is_current(self, copy: _StorageCopy, aliases: list[Tensor]) -> bool:
        """Return whether a copy is that of the present values of some tensors."""
        return self._pool.is_directly_usable or copy.versions == _versions(aliases) is not None

    def _copied(self, aliases: list[Tensor], *, is_outer: bool) -> _StorageCopy:
        """Return a new copy of the storage of some tensors."""
        stored, on_disk = self._pool.store(_storage_bytes(aliases[0]), is_outer=is_outer)
        return _StorageCopy(stored, on_disk, _versions(aliases))

    def _pop_copies(self) -> dict[int, _Offloaded]:
        """Remove all copies but the outer ones from the pool's byte counts and return them."""
        copies, self._copies = self._copies, {}
        for copy, _ in copies.values():
            self._count_bytes(copy, -1)
        return copies

    def _count_bytes(self, copy: _StorageCopy, sign: int) -> None:
        """Add the copy's bytes to the pool's counts, or subtract them with `sign=-1`."""
        if copy.on_disk:
            self._pool.disk += sign * copy.stored.numel()
        else:
            self._pool.memory += sign * self._pool.host_bytes(copy.stored)


def tensors_in(value: object) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def _unshared_storages(tensors: Iterable[Tensor], own_keys: set[int]) -> dict[int, list[Tensor]]:
    """Group tensors by storage address, without storages that other tensors use as well.

    A storage whose address is in `own_keys` is the stored copy itself: the copy is one more user.
    """
    groups: dict[int, dict[int, Tensor]] = {}
    for tensor in tensors:
        # A view keeps its base alive, and so the base's memory.
        for owner in (tensor, tensor._base):
            if owner is not None:
                groups.setdefault(_address(owner), {})[id(owner)] = owner
    return {
        key: list(group.values())
        for key, group in groups.items()
        if _count_users(next(iter(group.values()))) == len(group) + (key in own_keys)
    }


def _address(tensor: Tensor) -> int:
    """Address of the tensor's storage object, equal for all tensors of one storage."""
    return tensor.untyped_storage()._cdata


def _count_users(tensor: Tensor) -> int:
    """Number of tensors in this process that use the storage of `tensor`."""
    storage = tensor.untyped_storage()  # counts as one more user
    return int(torch._C._storage_Use_Count(storage._cdata)) - 1


def _storage_bytes(tensor: Tensor) -> Tensor:
    """All bytes of the tensor's storage, as a uint8 tensor that shares the memory."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _set_storage(tensors: Iterable[Tensor], memory: Tensor) -> None:
    """Let all tensors of one storage use the storage of `memory`; offset and strides stay."""
    for tensor in tensors:
        empty = torch.empty(0, dtype=tensor.dtype, device=memory.device)
        layout = tensor.storage_offset(), tensor.shape, tensor.stride()
        tensor.data = empty.set_(memory.untyped_storage(), *layout)


def _versions(tensors: Iterable[Tensor]) -> frozenset[int] | None:
    """Version counters of tensors, which change on every write; None if torch keeps no counters."""
    tensors = list(tensors)
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return frozenset(tensor._version for tensor in tensors)
