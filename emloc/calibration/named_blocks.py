"""The blocks to compress, one after the other: by name alone, or about to be run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from emloc.calibration.blockwise import Block, iterate_checkpoint
from emloc.calibration.calibrate import linears_of
from emloc.calibration.samples import Samples
from emloc.models.checkpoint.source import Source


def named_blocks(
    source: Source,
    samples: Samples | None,
    blocks: list[str],
    device: torch.device,
    host_bytes: int | None,
    folder: Path,
) -> Iterator[tuple[str, Block | None]]:
    """Every block by name, about to be run on the samples where there are any."""
    if samples is None:
        yield from ((name, None) for name in blocks)
        return
    batches = samples.batches(source)
    for one in iterate_checkpoint(
        source, batches, blocks, device, host_bytes=host_bytes, folder=folder
    ):
        yield one.name, one


def weights_of(
    source: Source, block: Block | None, layers: Iterable[str], device: torch.device
) -> dict[str, Tensor]:
    """The block's weights: those of the block about to be run, where there is one."""
    if block is not None:
        return {layer: one.weight for layer, one in linears_of(block, layers).items()}
    return {layer: source.weight(layer, device) for layer in layers}
