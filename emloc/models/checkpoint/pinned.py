"""Read stored tensors into pinned host memory, from which a copy to a GPU does not wait."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    tensors: Sequence[tuple[str, Tensor, StoredTensor | None]],
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, copy) of each tensor, in one piece of pinned memory.

    The tensors share a piece since torch rounds up the size of each.

    Args:
        tensors: name, tensor, and the stored tensor that it is, from whose file it is read. None:
            the tensor is a part of a stored one, and is copied.

    Raises:
        OSError: a file cannot be read, or has become shorter.
    """
    starts = [0, *accumulate(aligned_bytes(tensor.nbytes) for _, tensor, _ in tensors)]
    memory = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=True)
    readers = ThreadPoolExecutor(_READS, "read pinned")
    try:
        copies: list[tuple[str, Tensor, list[Future[object]]]] = []
        for (name, tensor, stored), start in zip(tensors, starts, strict=False):
            place = memory[start : start + tensor.nbytes]
            copy = place.view(tensor.dtype).view(tensor.shape)
            if stored is None:
                pieces: list[Future[object]] = [readers.submit(copy.copy_, tensor)]
            else:
                pieces = [
                    readers.submit(_read_piece, stored.file, stored.offset + at, part)
                    for at, part in _pieces(place)
                ]
            copies.append((name, copy, pieces))
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
