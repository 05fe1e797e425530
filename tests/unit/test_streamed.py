"""Blocks take turns in two rooms, and are there whenever they are computed."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from emloc.tensors.nn.streamed import ALIGN, MIN_PIECE, StreamedBlocks, piece_sizes

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


def moved(blocks: nn.ModuleList) -> StreamedBlocks:
    """Let the blocks be streamed, with the weights they have."""
    streamed = StreamedBlocks([dict(block.named_parameters()) for block in blocks], CPU)
    for index, block in enumerate(blocks):
        for name, view in streamed.views(index).items():
            view.copy_(block.get_parameter(name))
            owner, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(owner), leaf, nn.Parameter(view, requires_grad=False))
        streamed.store(index)
    streamed.attach(list(blocks))
    return streamed


def through(blocks, x, *, again: bool = False):
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False) if again else block(x)
    return x


def test_however_many_blocks_there_are_two_rooms_hold_them():
    blocks = stack()
    moved(blocks)
    rooms = [{p.untyped_storage().data_ptr() for p in block.parameters()} for block in blocks]
    assert all(len(one) == 1 for one in rooms)
    assert rooms[0] != rooms[1]
    assert rooms == [rooms[0], rooms[1], rooms[0], rooms[1], rooms[0]]
    begins = [p.data_ptr() - min(rooms[0]) for p in blocks[0].parameters()]
    assert [begin % ALIGN for begin in begins] == [0] * 5


def test_tensors_of_several_types_and_sizes_come_back_as_they_were_put_in():
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
        found = streamed.views(index)
        assert all(torch.equal(found[name], one) for name, one in blocks[index].items())


def test_a_pass_without_gradients_is_that_of_blocks_that_stay():
    x = torch.randn(4, 7)
    expected = through(stack(), x)
    blocks = stack()
    moved(blocks)
    for _ in range(2):
        assert torch.equal(through(blocks, x), expected)
        with torch.inference_mode():
            assert torch.equal(through(blocks, x), expected)


@pytest.mark.parametrize("part", ["whole", "forward"])
def test_gradients_are_those_of_blocks_that_stay_if_they_are_computed_again(part):
    """Also where what is computed again begins behind the hooks of the block itself."""

    class Again(Block):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    x, slope = torch.randn(4, 7), torch.randn(4, 7)
    kept = x.clone().requires_grad_()
    expected = through(stack(), kept)
    expected.backward(slope)
    blocks = stack()
    moved(blocks)
    if part == "forward":
        for block in blocks:
            block.__class__ = Again
    for _ in range(3):
        own = x.clone().requires_grad_()
        y = through(blocks, own, again=part == "whole")
        y.backward(slope)
        assert torch.equal(y, expected)
        assert torch.equal(own.grad, kept.grad)


def test_a_backward_pass_through_blocks_that_are_gone_fails_aloud():
    blocks = stack()
    moved(blocks)
    y = through(blocks, torch.randn(4, 7, requires_grad=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_part_of_a_block_that_is_called_alone_has_its_weights():
    x, expected = torch.randn(4, 7), stack()
    blocks = stack()
    moved(blocks)
    for index in (2, 4, 0, 1, 3, 0, 4):
        assert torch.equal(blocks[index].norm(x), expected[index].norm(x))
        assert torch.equal(blocks[index].up(x), expected[index].up(x))


def test_each_block_is_copied_once_on_its_way_up_and_once_on_its_way_down(monkeypatch):
    """Two are there already where the way turns."""
    blocks = stack()
    streamed = moved(blocks)
    through(blocks, torch.randn(4, 7))
    copied = []
    own = StreamedBlocks._copy
    monkeypatch.setattr(
        StreamedBlocks, "_copy", lambda self, index: (copied.append(index), own(self, index))
    )
    x = torch.randn(4, 7, requires_grad=True)
    for index in reversed(range(BLOCKS)):
        streamed.enter(index)
    copied.clear()
    for _ in range(2):
        through(blocks, x, again=True).sum().backward()
        assert copied == [2, 3, 4, 2, 1, 0]
        copied.clear()


@pytest.mark.parametrize("size", [1, MIN_PIECE, MIN_PIECE + 1, 416 * MIN_PIECE, 436_215_809])
def test_pinned_pieces_are_powers_of_two_and_hold_a_block_with_next_to_nothing_over(size):
    found = list(piece_sizes(size))
    assert all(piece.bit_count() == 1 and piece >= MIN_PIECE for piece in found)
    assert size <= sum(found) < size + MIN_PIECE
    assert found == sorted(found, reverse=True)
