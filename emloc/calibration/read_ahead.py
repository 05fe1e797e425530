"""Read the weights of the next block from disk while the passes run through the present block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from threading import Event, Thread
from typing import Protocol

import torch
from torch import Tensor, nn

from emloc.models.block_names import find_block
from emloc.models.checkpoint.pinned import aligned_bytes


def pinned_block_bytes(tensor_bytes: Mapping[str, int]) -> int:
    """Bytes of pinned host memory that the largest block of a model takes while it waits.

    torch rounds pinned memory up to a power of two, and keeps it for the next block.

    Args:
        tensor_bytes: parameter name -> bytes.
    """
    totals: dict[str, int] = {}
    for name, nbytes in tensor_bytes.items():
        if (block := find_block(name)) is not None:
            totals[block] = totals.get(block, 0) + aligned_bytes(nbytes)
    largest = max(totals.values(), default=0)
    return 1 << (largest - 1).bit_length() if largest else 0


class WeightReader(Protocol):
    """Reads the weights of a model block by block, as a `Source` does."""

    @property
    def buffers(self) -> list[str]:
        """Names of the buffers that are read with the weights."""

    def fill(
        self,
        model: nn.Module,
        names: Iterable[str],
        device: torch.device,
        ahead: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Load named parameters and buffers of `model` to `device`; move all buffers there.

        Tensors in `ahead`, which `read_ahead` has yielded, are not read again.
        """

    def read_ahead(self, names: Sequence[str], *, pinned: bool) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor in host memory) for those of the names that can be read ahead.

        A thread calls this method while `fill` may run in another one.

        Args:
            names: parameters and buffers of the model.
            pinned: in pinned memory, from which a copy to a GPU does not wait.
        """


class ReadAhead:
    """Fills the blocks of a model, with the weights of one block in host memory ahead of time.

    The weights wait in host memory, since a second block on the device would raise its peak memory.
    The copy from pinned memory to the device runs on the stream of the computation, which needs the
    weights next. The copy takes a small part of the time of the disk.
    """

    def __init__(self, weights: WeightReader, model: nn.Module, device: torch.device) -> None:
        self._weights, self._model, self._device = weights, model, device
        self._reading: _Reading | None = None

    def start(self, remaining: Sequence[str]) -> None:
        """Begin to read the first of the remaining blocks in a thread.

        The passes may reach another block first. That one is then read when they reach it, and the
        first one waits, so that one block at most is in host memory.
        """
        if self._reading is None and remaining:
            block, pinned = remaining[0], self._device.type == "cuda"
            self._reading = _Reading(self._weights, block, self._names_in(block), pinned=pinned)

    def fill(self, block: str) -> None:
        """Load the weights of the block to the device, wherever they are.

        Raises:
            ConfigError: a tensor is missing or damaged, or cannot be computed.
        """
        ahead: Mapping[str, Tensor] | None = None
        if self._reading is not None and self._reading.block == block:
            ahead = self._reading.wait()
            self._reading = None
        self._weights.fill(self._model, self._names_in(block), self._device, ahead)

    def close(self) -> None:
        """End the thread, which reads no further tensor."""
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _names_in(self, block: str) -> list[str]:
        """Names of the parameters of a block, and of the buffers that are read with them."""
        module = self._model.get_submodule(block)
        parameters = [f"{block}.{leaf}" for leaf, _ in module.named_parameters()]
        return parameters + [name for name in self._weights.buffers if name.startswith(f"{block}.")]


class _Reading:
    """A thread that reads the tensors of one block into host memory.

    It ends at the first error. The main thread then reads the rest of the block itself, so that it
    raises the error, if that was no passing one.
    """

    def __init__(
        self, weights: WeightReader, block: str, names: Sequence[str], *, pinned: bool
    ) -> None:
        self.block = block
        self._tensors: dict[str, Tensor] = {}
        self._cancelled = Event()
        self._thread = Thread(
            target=self._read, args=(weights, names, pinned), name="read ahead", daemon=True
        )
        self._thread.start()

    def wait(self) -> Mapping[str, Tensor]:
        """Return the tensors by name, when the thread has ended."""
        self._thread.join()
        return self._tensors

    def cancel(self) -> None:
        """End the thread behind the tensor that it reads."""
        self._cancelled.set()
        self._thread.join()

    def _read(self, weights: WeightReader, names: Sequence[str], pinned: bool) -> None:
        try:
            for name, tensor in weights.read_ahead(names, pinned=pinned):
                self._tensors[name] = tensor
                if self._cancelled.is_set():
                    return
        except Exception:  # why: the main thread meets the same error, and raises it
            return
