"""The blocks of a model, and the order in which its forward passes reach them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import nn


def ordered_blocks(modules: Mapping[str, nn.Module], decoder: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks by name, with the blocks outside the decoder first.

    The decoder reads the features of a vision tower, wherever the model keeps the tower.
    """
    decoder_ids = {id(module) for module in decoder.modules()}
    return dict(sorted(modules.items(), key=lambda item: id(item[1]) in decoder_ids))


def next_block(remaining: Sequence[str], reached: Collection[str | None]) -> str:
    """Return the name of the block to run next.

    This is the first of the remaining blocks. If no pass has reached it, a pass may wait at another
    list of blocks in the same part of the model, as Qwen3-VL merges the features of a block of its
    vision tower before the next block. The block of that pass is then the next one.

    Args:
        remaining: names of the blocks that have not run, in the order of the model.
        reached: names of the blocks at which passes wait.
    """
    first = remaining[0]
    if first in reached:
        return first
    part = _part_of(first)
    return next((name for name in remaining if name in reached and _part_of(name) == part), first)


def _part_of(block: str) -> str:
    """Return the name of the module that holds the block's list: `a.b` for `a.b.layers.3`."""
    return block.rpartition(".")[0].rpartition(".")[0]
