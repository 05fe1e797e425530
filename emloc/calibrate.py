"""Stage 1a: run the original model over the calibration samples and keep second moments."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from emloc.samples import Samples
from emloc.source import Source
from emloc.statistics import Statistics, Taken
from emloc.walk import Block, by_block, open_walk

Layers = dict[str, tuple[int, int]]


def calibrate(
    folder: Path,
    source: Source,
    layers: Layers,
    samples: Samples,
    whole: bool,
    *,
    device: torch.device,
) -> dict[str, Any]:
    """Write one file of second moments per block; blocks already there are not computed again.

    With `whole`, an input Gram for every layer, also where its outputs are the smaller matrix.
    """
    blocks = by_block(layers)
    run = open_walk(source, samples.batches(source), list(blocks), device)
    tokens, outputs = 0, list[str]()
    for block in tqdm(run, "calibrate", total=len(blocks), unit="block"):
        path = folder / f"{block.name}.safetensors"
        if path.exists():
            statistics = Statistics.load(path)
        else:
            statistics = observe(block, blocks[block.name], whole)
            statistics.save(path)
        tokens = statistics.tokens
        outputs += statistics.outputs
    return {"tokens": tokens, "outputs": outputs, "samples": samples.ids}


def observe(block: Block, layers: Iterable[str], whole: bool) -> Statistics:
    """Run the block and sum the second moments of its layers."""
    linears = linears_of(block, layers)
    weights = {name: linear.weight for name, linear in linears.items()}
    statistics = Statistics()
    with Taken(linears) as taken:
        block.run(lambda mask: statistics.add(taken.rows(mask), weights, whole))
    return statistics


def linears_of(block: Block, layers: Iterable[str]) -> dict[str, nn.Linear]:
    """Full name -> module, for layers of this block."""
    found = {name: block.module.get_submodule(name[len(block.name) + 1 :]) for name in layers}
    return {name: module for name, module in found.items() if isinstance(module, nn.Linear)}
