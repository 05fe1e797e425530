"""Pieces of memory are reused when nothing refers to them, and never before."""

import gc
import threading

import pytest
import torch

from emloc.calibration import pinned_pieces
from emloc.calibration.pinned_pieces import PinnedPieces, piece_bytes

SLAB = 1 << 16


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch):
    monkeypatch.setattr(pinned_pieces, "_FIRST_SLAB", SLAB)
    monkeypatch.setattr(pinned_pieces, "_LARGEST_SLAB", 2 * SLAB)


def test_a_piece_takes_an_eighth_more_than_its_size_at_most():
    for size in (1, 511, 512, 513, 4097, 65537, 20_971_520, 2**31 + 1):
        assert size <= piece_bytes(size) <= max(512, size * 9 / 8 + 512)
        assert piece_bytes(size) % 512 == 0
        assert piece_bytes(piece_bytes(size)) == piece_bytes(size)


def test_pieces_in_use_never_overlap():
    torch.manual_seed(0)
    pieces, held = PinnedPieces(pinned=False), {}
    for step in range(400):
        size = int(torch.randint(1, 20_000, ()))
        piece = pieces.take(size).fill_(step % 251)
        assert piece.shape == (size,)
        assert piece.untyped_storage().nbytes() == size  # so that it can be moved as a whole
        held[step] = piece
        if len(held) > 20:
            held.pop(list(held)[int(torch.randint(0, len(held), ()))])
    for step, piece in held.items():
        assert (piece == step % 251).all()
    assert pieces.allocated < 3 * 21 * piece_bytes(20_000)


def test_a_view_keeps_its_piece():
    pieces = PinnedPieces(pinned=False)
    view = pieces.take(1000).fill_(7)[100:].view(torch.float32)
    gc.collect()
    for _ in range(100):
        pieces.take(1000).fill_(9)
    assert (view.view(torch.uint8) == 7).all()
    assert pieces.allocated == SLAB


def test_a_slab_without_pieces_is_divided_anew():
    pieces = PinnedPieces(pinned=False)
    small = [pieces.take(600) for _ in range(SLAB // 1024)]
    assert pieces.allocated == SLAB
    del small
    assert pieces.take(SLAB // 2 + 1).numel() == SLAB // 2 + 1
    assert pieces.allocated == SLAB


def test_a_piece_that_another_thread_drops_is_free():
    pieces = PinnedPieces(pinned=False)
    held = [pieces.take(SLAB)]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    pieces.take(SLAB)
    assert pieces.allocated == SLAB


def test_a_piece_outlives_the_end():
    pieces = PinnedPieces(pinned=False)
    piece = pieces.take(1000).fill_(3)
    pieces.close()
    assert pieces.allocated == 0
    pieces.take(1000).fill_(4)
    assert (piece == 3).all()
