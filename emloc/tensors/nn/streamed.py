"""Frozen blocks that wait in host memory and take turns on the device.

The device has two rooms, each as large as the largest block, and block i is only ever in room
i % 2. Its tensors are views into that room, made once: bytes are copied, no tensor is ever
exchanged, and whoever holds one (a parameter, a closure) goes on holding it. While one block is
computed, the next one on the way (up in the forward pass, down in the backward pass) is copied on a
stream of its own.

Whoever goes back through a block has to compute it again first. Where that is forgotten, autograd
finds that the weights it kept were written over, and fails: a view shares its room's version.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Bytes: no tensor begins between two multiples of this, so that kernels read at full speed.
ALIGN = 256
# Bytes: the last piece of a block in host memory may be larger than what is left by less than this.
SMALLEST = 2**20

# Name -> where a tensor begins in its block, in bytes, and a tensor of its shape and dtype.
Layout = dict[str, tuple[int, Tensor]]


class StreamedBlocks:
    """Blocks in host memory, two rooms on the device.

    `blocks`: for each, in the order they are computed in, name -> a tensor of the shape and dtype
    of what is held; the meta device will do.
    """

    def __init__(self, blocks: Sequence[Mapping[str, Tensor]], device: torch.device) -> None:
        laid = [_layout(block) for block in blocks]
        self._layouts = [layout for layout, _ in laid]
        largest = max(size for _, size in laid)
        self._rooms = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(2)]
        pinned = device.type == "cuda"
        self._halves = [
            list(_halves(size, self._rooms[index % 2], pinned))
            for index, (_, size) in enumerate(laid)
        ]
        self._device = device
        self._beside = torch.cuda.Stream(device) if pinned else None  # type: ignore[no-untyped-call]
        self._copied: list[torch.cuda.Event | None] = [None, None]  # when a room was filled
        self._held: list[int | None] = [None, None]  # the block in each room
        self._at: int | None = None  # the block that is computed

    def views(self, index: int) -> dict[str, Tensor]:
        """Name -> tensor of block `index` in its room: of that block when it is computed.

        To fill a block, write into all of them and `keep` it, before the next one.
        """
        room = self._rooms[index % 2]
        return {
            name: room[start : start + like.nbytes].view(like.dtype).view(like.shape)
            for name, (start, like) in self._layouts[index].items()
        }

    def keep(self, index: int) -> None:
        """Take what was written into the views of block `index` to host memory."""
        for host, there in self._halves[index]:
            host.copy_(there)
        self._held[index % 2] = index

    def attach(self, modules: Sequence[nn.Module]) -> None:
        """Let the blocks be in their rooms whenever `modules`, one for each, are computed.

        Every module inside one asks for it: what is computed again may enter a block behind its
        own hooks, and a part may be called alone.
        """
        for index, block in enumerate(modules):

            def enter(*_: Any, index: int = index) -> None:
                self.enter(index)

            for module in block.modules():
                module.register_forward_pre_hook(enter)

    def enter(self, index: int) -> None:
        """Have block `index` there for all that is computed from now on, and the next on its way.

        Which one is next is a guess from the last one; a wrong guess costs a copy.
        """
        if index == self._at:
            return
        self._fetch(index)
        if (copied := self._copied[index % 2]) is not None:
            torch.cuda.current_stream(self._device).wait_event(copied)
        following = index + (1 if self._at is None or index > self._at else -1)
        self._at = index
        if 0 <= following < len(self._halves):
            self._fetch(following)

    def _fetch(self, index: int) -> None:
        room = index % 2
        if self._held[room] == index:
            return
        with torch.no_grad():
            if self._beside is None:
                self._copy(index)
            else:
                # All that reads what is in the room now was started before: the blocks on either
                # side of this one are done, forwards and backwards, when one of them is entered.
                self._beside.wait_stream(torch.cuda.current_stream(self._device))
                with torch.cuda.stream(self._beside):
                    self._copy(index)
                    self._copied[room] = self._beside.record_event()
        self._held[room] = index

    def _copy(self, index: int) -> None:
        for host, there in self._halves[index]:
            there.copy_(host, non_blocking=True)


def _layout(tensors: Mapping[str, Tensor]) -> tuple[Layout, int]:
    """Where each tensor begins, and the bytes of all."""
    found, size = {}, 0
    for name, like in tensors.items():
        found[name] = size, like
        size += -(-like.nbytes // ALIGN) * ALIGN
    return found, size


def pieces(size: int) -> Iterator[int]:
    """Powers of two, none below `SMALLEST`, that together hold `size` bytes.

    Pinned memory is handed out in powers of two: one piece would waste up to half of it.
    """
    while size > 0:
        piece = max(1 << (size.bit_length() - 1), SMALLEST)
        yield piece
        size -= piece


def _halves(size: int, room: Tensor, pinned: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of host memory, `size` bytes together, and the part of the room each belongs to."""
    start = 0
    for piece in pieces(size) if pinned else (size,):
        used = min(piece, size - start)
        host = torch.empty(piece, dtype=torch.uint8, pin_memory=pinned)
        yield host[:used], room[start : start + used]
        start += used
