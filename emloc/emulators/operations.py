"""The share of the original's arithmetic that an emulator takes.

Arithmetic is counted in multiplications of the decoder's blocks for one token. Their linear layers
alone count. The products of queries, keys and values are left out, since they depend on the length
of a row: for rows of T tokens and a model of width w they are about T / 6w of a block's linears. A
share is right where an emulator leaves out blocks or heads, which have both. Factorised layers do
not change these products, so the true share s + T / 6w over 1 + T / 6w is a little larger.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from emloc.emulators.layer_drop import block_stack
from emloc.models.checkpoint.source import Source
from emloc.tensors.nn.operations import linear_operations


def operations_share(emulator: nn.Module, source: Source) -> float:
    """Operations of the emulator as a share of the original's, rho; 1 for the original itself.

    Args:
        emulator: the opened emulator, whose blocks have the original's names. A LoRA does not
            count.
        source: the original model.
    """
    blocks = (emulator.get_submodule(block) for block in block_stack(source))
    total = block_operations(source)
    return sum(map(linear_operations, blocks)) / total if total else 1.0


def block_operations(source: Source) -> int:
    """Multiplications that a token takes in the linear layers of the original's decoder blocks."""
    return layer_operations(source, source.linears)


def layer_operations(source: Source, layers: Iterable[str]) -> int:
    """Multiplications that a token takes in those of `layers` that are in decoder blocks."""
    prefixes = tuple(f"{block}." for block in block_stack(source))
    shapes = (source.linears[layer] for layer in layers if layer.startswith(prefixes))
    return sum(rows * columns for rows, columns in shapes)
