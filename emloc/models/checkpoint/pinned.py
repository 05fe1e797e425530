"""Read stored tensors into pinned host memory, from which a copy to a GPU does not wait."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from emloc.models.checkpoint.files import StoredTensor

_ALIGNMENT = 64  # bytes
# Reads that a disk answers at once, and bytes of each. A copy from a mapped file reads each page
# where it is touched: on a fast disk that took half as long again.
_READS, _PIECE = 8, 16 * 2**20


def aligned_bytes(nbytes: int) -> int:
    """Bytes of a tensor in pinned memory, rounded up so that the next one is aligned."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def read_pinned(
    whole: Mapping[str, StoredTensor], parts: Sequence[tuple[str, Tensor]] = ()
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, copy) of each tensor, in one piece of pinned memory.

    The tensors share a piece since torch rounds up the size of each. Stored tensors are read with
    the files' headers alone: to map a file into memory took a tenth of a second a block on a busy
    disk, in which Python stood still.

    Args:
        whole: names, and stored tensors of a dtype that torch has.
        parts: (name, tensor) of parts of stored tensors in a mapped file, which are copied.

    Raises:
        OSError: a file cannot be read, or has become shorter.
    """
    sizes = [*(one.nbytes for one in whole.values()), *(tensor.nbytes for _, tensor in parts)]
    starts = [0, *accumulate(map(aligned_bytes, sizes))]
    memory = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=True)
    places = [memory[start : start + size] for start, size in zip(starts, sizes, strict=False)]
    readers = ThreadPoolExecutor(_READS, "read pinned")
    try:
        copies: list[tuple[str, Tensor, list[Future[object]]]] = []
        for (name, stored), place in zip(whole.items(), places, strict=False):
            pieces: list[Future[object]] = [
                readers.submit(_read_piece, stored.file, stored.offset + at, piece)
                for at, piece in _pieces(place)
            ]
            assert stored.torch_dtype is not None
            copies.append((name, place.view(stored.torch_dtype).view(stored.shape), pieces))
        for (name, tensor), place in zip(parts, places[len(whole) :], strict=True):
            copy = place.view(tensor.dtype).view(tensor.shape)
            copies.append((name, copy, [readers.submit(copy.copy_, tensor)]))
        for name, copy, pieces in copies:
            for piece in pieces:
                piece.result()
            yield name, copy
    finally:
        readers.shutdown(cancel_futures=True)


def _pieces(place: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield (first byte, part) of some memory (bytes,), at most `_PIECE` bytes each."""
    for at in range(0, len(place), _PIECE):
        yield at, place[at : at + _PIECE]


def _read_piece(path: Path, offset: int, place: Tensor) -> None:
    """Fill `place` (bytes,) with the bytes of a file from `offset` on."""
    view = place.numpy().data
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while view:
            count = file.readinto(view)
            if not count:
                raise OSError(f"{path}: ends before byte {offset + len(place)}")
            view = view[count:]
