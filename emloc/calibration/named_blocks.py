"""Iterate over the blocks to compress, with or without running them on samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from emloc.calibration.blockwise import Block, iterate_checkpoint
from emloc.calibration.calibrate import linears_of
from emloc.calibration.offload import StateLimits
from emloc.calibration.samples import Samples
from emloc.models.checkpoint.source import Source


def named_blocks(
    source: Source,
    samples: Samples | None,
    blocks: list[str],
    device: torch.device,
    limits: StateLimits,
    folder: Path,
) -> Iterator[tuple[str, Block | None]]:
    """Yield each block's name, and the block ready to run on the samples (None without samples).

    See `iterate_blocks` for `limits` and `folder`.
    """
    if samples is None:
        yield from ((name, None) for name in blocks)
        return
    batches = samples.batches(source, device)
    for block in iterate_checkpoint(source, batches, blocks, device, limits=limits, folder=folder):
        yield block.name, block


def weights_of(
    source: Source, block: Block | None, layers: Iterable[str], device: torch.device
) -> dict[str, Tensor]:
    """Layer -> its weight (m, n), from the loaded `block` or else from the checkpoint."""
    if block is not None:
        return {layer: linear.weight for layer, linear in linears_of(block, layers).items()}
    return {layer: source.weight(layer, device) for layer in layers}
