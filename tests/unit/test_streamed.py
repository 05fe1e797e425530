"""Streamed blocks share two device buffers and have their weights whenever they compute."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from emloc.runtime.work_meter import metered
from emloc.tensors.nn.streamed import (
    ALIGN,
    MIN_PIECE,
    StreamedBlocks,
    forget_streamed,
    piece_sizes,
)

CPU = torch.device("cpu")
BLOCKS = 5


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, width + 3)
        self.down = nn.Linear(width + 3, width, bias=False)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).tanh())


def stack(width: int = 7) -> nn.ModuleList:
    torch.manual_seed(0)
    blocks = nn.ModuleList(Block(width) for _ in range(BLOCKS)).requires_grad_(False)
    for block in blocks:
        for parameter in block.parameters():
            nn.init.normal_(parameter)
    return blocks


def stream(blocks: nn.ModuleList) -> StreamedBlocks:
    """Stream these blocks, with their present weights."""
    streamed = StreamedBlocks([dict(block.named_parameters()) for block in blocks], CPU)
    for index, block in enumerate(blocks):
        for name, view in streamed.views(index).items():
            view.copy_(block.get_parameter(name))
            owner, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(owner), leaf, nn.Parameter(view, requires_grad=False))
        streamed.store(index)
    streamed.attach(list(blocks))
    return streamed


def run_blocks(blocks, x, *, again: bool = False):
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False) if again else block(x)
    return x


def test_all_blocks_share_two_buffers():
    blocks = stack()
    stream(blocks)
    rooms = [{p.untyped_storage().data_ptr() for p in block.parameters()} for block in blocks]
    assert all(len(one) == 1 for one in rooms)
    assert rooms[0] != rooms[1]
    assert rooms == [rooms[0], rooms[1], rooms[0], rooms[1], rooms[0]]
    begins = [p.data_ptr() - min(rooms[0]) for p in blocks[0].parameters()]
    assert [begin % ALIGN for begin in begins] == [0] * 5


def test_tensors_of_several_dtypes_and_sizes_are_restored_exactly():
    torch.manual_seed(0)
    blocks = [
        {
            "codes": torch.randint(0, 255, (size, 1), dtype=torch.uint8),
            "scale": torch.randn(size),
            "wide": torch.randn(3, size).bfloat16(),
        }
        for size in (5, 300, 1, 77)
    ]
    streamed = StreamedBlocks(blocks, CPU)
    for index, block in enumerate(blocks):
        for name, view in streamed.views(index).items():
            view.copy_(block[name])
        streamed.store(index)
    for index in (0, 1, 2, 3, 2, 1, 0, 3, 0):
        streamed.enter(index)
        views = streamed.views(index)
        assert all(torch.equal(views[name], one) for name, one in blocks[index].items())


def test_a_forward_without_gradients_equals_that_of_resident_blocks():
    x = torch.randn(4, 7)
    expected = run_blocks(stack(), x)
    blocks = stack()
    stream(blocks)
    for _ in range(2):
        assert torch.equal(run_blocks(blocks, x), expected)
        with torch.inference_mode():
            assert torch.equal(run_blocks(blocks, x), expected)


@pytest.mark.parametrize("part", ["whole", "forward"])
def test_gradients_with_recomputation_equal_those_of_resident_blocks(part):
    """Also if the recomputation starts after the hooks of the block itself."""

    class Again(Block):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    x, slope = torch.randn(4, 7), torch.randn(4, 7)
    reference_input = x.clone().requires_grad_()
    expected = run_blocks(stack(), reference_input)
    expected.backward(slope)
    blocks = stack()
    stream(blocks)
    if part == "forward":
        for block in blocks:
            block.__class__ = Again
    for _ in range(3):
        own = x.clone().requires_grad_()
        y = run_blocks(blocks, own, again=part == "whole")
        y.backward(slope)
        assert torch.equal(y, expected)
        assert torch.equal(own.grad, reference_input.grad)


def test_a_backward_pass_without_recomputation_raises_an_error():
    blocks = stack()
    stream(blocks)
    y = run_blocks(blocks, torch.randn(4, 7, requires_grad=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_single_module_of_a_block_has_its_weights():
    x, expected = torch.randn(4, 7), stack()
    blocks = stack()
    stream(blocks)
    for index in (2, 4, 0, 1, 3, 0, 4):
        assert torch.equal(blocks[index].norm(x), expected[index].norm(x))
        assert torch.equal(blocks[index].up(x), expected[index].up(x))


def test_each_block_is_copied_once_forward_and_once_backward(monkeypatch):
    """The last two blocks are still in the buffers when the backward pass starts."""
    blocks = stack()
    streamed = stream(blocks)
    run_blocks(blocks, torch.randn(4, 7))
    copied = []
    own = StreamedBlocks._copy
    monkeypatch.setattr(
        StreamedBlocks, "_copy", lambda self, index: (copied.append(index), own(self, index))
    )
    x = torch.randn(4, 7, requires_grad=True)
    for index in reversed(range(BLOCKS)):
        streamed.enter(index)
    copied.clear()
    size = sum(part.nbytes for _, part in streamed._pieces[0])
    for _ in range(2):
        with metered() as meter:
            run_blocks(blocks, x, again=True).sum().backward()
        assert copied == [2, 3, 4, 2, 1, 0]
        assert meter.weight_bytes == 6 * size
        copied.clear()


def test_forgotten_blocks_are_copied_anew():
    """A CUDA graph leaves other blocks in the buffers than the host knows of."""
    blocks = stack()
    streamed, x = stream(blocks), torch.randn(4, 7)
    expected = run_blocks(blocks, x)
    for index in reversed(range(BLOCKS)):
        streamed.enter(index)
    for buffer in streamed._buffers:
        buffer.zero_()
    assert not torch.equal(run_blocks(blocks, x), expected)
    forget_streamed()
    with metered() as meter:
        assert torch.equal(run_blocks(blocks, x), expected)
    assert meter.weight_bytes == BLOCKS * sum(part.nbytes for _, part in streamed._pieces[0])


@pytest.mark.parametrize("size", [1, MIN_PIECE, MIN_PIECE + 1, 416 * MIN_PIECE, 436_215_809])
def test_pinned_pieces_are_powers_of_two_with_little_waste(size):
    views = list(piece_sizes(size))
    assert all(piece.bit_count() == 1 and piece >= MIN_PIECE for piece in views)
    assert size <= sum(views) < size + MIN_PIECE
    assert views == sorted(views, reverse=True)
