"""Stream frozen blocks from host memory through two buffers on the device.

Each buffer is as large as the largest block, and block i always uses buffer i % 2. The tensors of a
block are views of its buffer, created once: streaming copies bytes and never replaces a tensor, so
parameters and closures that refer to one stay valid. While one block computes, the next is copied
on a separate CUDA stream: the following block in the forward pass, the preceding in the backward
pass.

The backward pass has to recompute a block (activation checkpointing) before it uses the weights.
Without recomputation, autograd raises an error, since the weights it saved were overwritten: a view
shares the version counter of its buffer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from emloc.runtime.work_meter import count_weights

# In bytes: each tensor of a block starts at a multiple of this, so that kernels read at full speed.
ALIGN = 256
# In bytes: the smallest piece of pinned memory; the last piece of a block wastes less than this.
MIN_PIECE = 2**20

# All streamed blocks of this process.
_alive: WeakSet[StreamedBlocks] = WeakSet()

# Tensor name -> its first byte within the block, and a tensor of the same shape and dtype.
Layout = dict[str, tuple[int, Tensor]]


class StreamedBlocks:
    """Blocks of tensors in host memory, copied in turn into two buffers on the device.

    Args:
        blocks: for each block, in the order of computation: name -> a tensor with shape and dtype
            of the tensor to stream, which may be on the meta device.
        device: where the blocks are computed.
    """

    def __init__(self, blocks: Sequence[Mapping[str, Tensor]], device: torch.device) -> None:
        layouts = [_layout(block) for block in blocks]
        self._layouts = [layout for layout, _ in layouts]
        largest = max(size for _, size in layouts)
        self._buffers = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(2)]
        pinned = device.type == "cuda"
        self._pieces = [
            list(_host_pieces(size, self._buffers[index % 2], pinned))
            for index, (_, size) in enumerate(layouts)
        ]
        self._device = device
        self._stream = torch.cuda.Stream(device) if pinned else None  # type: ignore[no-untyped-call]
        self._copied: list[torch.cuda.Event | None] = [None, None]  # when each buffer was filled
        self._loaded: list[int | None] = [None, None]  # index of the block in each buffer
        self._current: int | None = None  # index of the block that computes
        _alive.add(self)

    def forget(self) -> None:
        """Let no block count as loaded, so that the next one that computes is copied."""
        self._copied, self._loaded, self._current = [None, None], [None, None], None

    def join(self) -> None:
        """Let the current stream wait for the copies that were begun since `forget`."""
        for copied in self._copied:
            if copied is not None:
                torch.cuda.current_stream(self._device).wait_event(copied)

    def views(self, index: int) -> dict[str, Tensor]:
        """Name -> tensor of block `index`, as a view of its buffer; valid while the block computes.

        To set the weights of a block, write to all its views and call `store`, then go on to the
        next block.
        """
        buffer = self._buffers[index % 2]
        return {
            name: buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)
            for name, (start, like) in self._layouts[index].items()
        }

    def store(self, index: int) -> None:
        """Copy the views of block `index` to host memory, after they were written."""
        for host, part in self._pieces[index]:
            host.copy_(part)
        self._loaded[index % 2] = index

    def attach(self, modules: Sequence[nn.Module]) -> None:
        """Register hooks that load a block's weights whenever its module runs.

        `modules` has one module per block. Each submodule gets the hook, too: a recomputation may
        start inside a block without calling the block's own hooks, and a submodule may be called
        alone.
        """
        for index, block in enumerate(modules):

            def enter(*_: Any, index: int = index) -> None:
                self.enter(index)

            for module in block.modules():
                module.register_forward_pre_hook(enter)

    def enter(self, index: int) -> None:
        """Make the weights of block `index` available, and start to copy the next block.

        The next block is guessed from the direction of the last step; a wrong guess costs one copy.
        """
        if index == self._current:
            return
        self._load(index)
        if (copied := self._copied[index % 2]) is not None:
            torch.cuda.current_stream(self._device).wait_event(copied)
        following = index + (1 if self._current is None or index > self._current else -1)
        self._current = index
        if 0 <= following < len(self._pieces):
            self._load(following)

    def _load(self, index: int) -> None:
        """Copy block `index` into its buffer, on the separate stream, unless it is there."""
        slot = index % 2
        if self._loaded[slot] == index:
            return
        with torch.no_grad():
            if self._stream is None:
                self._copy(index)
            else:
                # Everything that reads the buffer's present block was launched before: when a
                # block is entered, its neighbours are finished in this direction.
                self._stream.wait_stream(torch.cuda.current_stream(self._device))
                with torch.cuda.stream(self._stream):
                    self._copy(index)
                    self._copied[slot] = self._stream.record_event()
        self._loaded[slot] = index

    def _copy(self, index: int) -> None:
        """Copy all pieces of block `index` from host memory to its buffer."""
        for host, part in self._pieces[index]:
            part.copy_(host, non_blocking=True)
            count_weights(part.nbytes)


def forget_streamed() -> None:
    """Let no streamed block count as loaded, since a CUDA graph loads blocks by itself.

    A graph that is recorded next copies all its blocks, whatever is in the buffers before it.
    """
    for blocks in _alive:
        blocks.forget()


def join_streamed() -> None:
    """Let the current stream wait for all copies of blocks, since a CUDA graph must end with them.

    The last block that computes in a graph may have begun to copy one that does not.
    """
    for blocks in _alive:
        blocks.join()


def _layout(tensors: Mapping[str, Tensor]) -> tuple[Layout, int]:
    """The first byte of each tensor within its block, and the size of the block in bytes."""
    layout, size = {}, 0
    for name, like in tensors.items():
        layout[name] = size, like
        size += -(-like.nbytes // ALIGN) * ALIGN
    return layout, size


def piece_sizes(size: int) -> Iterator[int]:
    """Yield powers of two, at least `MIN_PIECE` each, that add up to `size` bytes or slightly more.

    Pinned memory is allocated in powers of two: a single piece could waste half of it.
    """
    while size > 0:
        piece = max(1 << (size.bit_length() - 1), MIN_PIECE)
        yield piece
        size -= piece


def _host_pieces(size: int, buffer: Tensor, pinned: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield pieces of host memory, `size` bytes in total, with the part of the buffer of each."""
    start = 0
    for piece in piece_sizes(size) if pinned else (size,):
        length = min(piece, size - start)
        host = torch.empty(piece, dtype=torch.uint8, pin_memory=pinned)
        yield host[:length], buffer[start : start + length]
        start += length
