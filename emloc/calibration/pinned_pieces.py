"""Pieces of pinned host memory, from and to which a GPU copies while the program goes on.

torch rounds every allocation of pinned memory up to a power of two. These pieces lie in few large
ones, and take an eighth more than their size at most.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from weakref import finalize

import torch
from torch import Tensor

# Bytes of the first slab; each further one is twice as large, up to the second figure.
_FIRST_SLAB, _LARGEST_SLAB = 2**24, 2**28
_ALIGNMENT = 512  # bytes


@dataclass(eq=False)
class _Slab:
    """One allocation, and how much of it is in use."""

    memory: Tensor  # (bytes,) uint8
    end: int = 0  # first byte that belongs to no place
    places_in_use: int = 0


@dataclass(frozen=True)
class _Place:
    """A part of a slab."""

    slab: _Slab
    start: int
    size: int


@dataclass
class PinnedPieces:
    """Hands out pieces of pinned memory; a piece is free again when nothing refers to it.

    Copies must all be made on one stream, so that a new copy into a piece comes behind those of its
    last use.

    Attributes:
        pinned: whether the memory is pinned; False: a machine without a GPU.
    """

    pinned: bool = True
    _slabs: list[_Slab] = field(default_factory=list)
    _free: dict[int, list[_Place]] = field(default_factory=dict)  # size -> places
    # Filled by finalizers, which the garbage collector may run in any thread.
    _returned: deque[_Place] = field(default_factory=deque)

    @property
    def allocated(self) -> int:
        """Bytes of all slabs."""
        return sum(slab.memory.numel() for slab in self._slabs)

    def take(self, size: int) -> Tensor:
        """Return memory (size,) uint8 that has its storage for itself.

        Raises:
            RuntimeError: the system has no memory to pin.
        """
        self._collect()
        room = piece_bytes(size)
        places = self._free.get(room)
        place = places.pop() if places else self._carve(room)
        place.slab.places_in_use += 1
        array = place.slab.memory.numpy()[place.start : place.start + size]
        finalize(array, self._returned.append, place)
        return torch.from_numpy(array)

    def close(self) -> None:
        """Give the memory back to the system, as soon as no piece is in use.

        The copies must have ended.
        """
        self._slabs, self._free = [], {}
        self._returned.clear()
        if self.pinned:
            # The first name is missing in torch 2.11.
            getattr(torch.accelerator, "empty_host_cache", torch._C._host_emptyCache)()

    def _collect(self) -> None:
        """Take back the pieces that nothing refers to."""
        while self._returned:
            place = self._returned.popleft()
            place.slab.places_in_use -= 1
            self._free.setdefault(place.size, []).append(place)
            if not place.slab.places_in_use:
                self._clear(place.slab)

    def _clear(self, slab: _Slab) -> None:
        """Make a slab whole again, so that it can be divided into places of other sizes."""
        slab.end = 0
        for size, places in self._free.items():
            self._free[size] = [place for place in places if place.slab is not slab]

    def _carve(self, size: int) -> _Place:
        """Return a new place, in a new slab if there is no room."""
        slab = next((one for one in self._slabs if one.memory.numel() - one.end >= size), None)
        if slab is None:
            usual = min(_FIRST_SLAB << len(self._slabs), _LARGEST_SLAB)
            rounded = 1 << (max(size, usual) - 1).bit_length()
            slab = _Slab(torch.empty(rounded, dtype=torch.uint8, pin_memory=self.pinned))
            self._slabs.append(slab)
        place = _Place(slab, slab.end, size)
        slab.end += size
        return place


def piece_bytes(size: int) -> int:
    """Return the bytes that a piece takes: its size, rounded up by an eighth at most."""
    step = max(_ALIGNMENT, 1 << max(0, size.bit_length() - 4))
    return -(-size // step) * step
