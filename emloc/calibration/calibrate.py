"""Stage 1a: run the original model over the calibration samples and keep second moments."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from emloc.calibration.blockwise import Block, by_block, iterate_checkpoint
from emloc.calibration.moments import InputRecorder, Statistics
from emloc.calibration.samples import Samples
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import Source
from emloc.runtime.journal import Journal
from emloc.runtime.progress import tracked

# Name -> (out, in).
Layers = dict[str, tuple[int, int]]


def statistics_bytes(layers: Layers, whole: bool) -> int:
    """Bytes of all second moments in float64, at most: layers of one input share theirs."""
    sides = ((n if whole else min(m, n)) for m, n in layers.values())
    return sum(8 * side * side for side in sides)


def calibrate(
    folder: Path,
    source: Source,
    layers: Layers,
    samples: Samples,
    whole: bool,
    *,
    device: torch.device,
    host_bytes: int | None = None,
) -> dict[str, Any]:
    """Write one file of second moments per block, and a line about it into `journal.jsonl`.

    With `whole`, an input Gram for every layer, also where its outputs are the smaller matrix. An
    interrupted calibration goes on with the next block: those it has are run again, as what they
    give is needed, but not summed. `host_bytes` is what hidden states may take of host memory.
    """
    blocks = by_block(layers)
    run = iterate_checkpoint(
        source,
        samples.batches(source),
        list(blocks),
        device,
        host_bytes=host_bytes,
        folder=folder,
    )
    journal = Journal(folder)
    for block in tracked(run, "calibrate", len(blocks), "block"):
        if block.name not in journal.lines:
            start = time.perf_counter()
            statistics = record_moments(block, blocks[block.name], whole)
            statistics.save(journal.file(block.name))
            journal.add(
                block.name,
                tokens=statistics.tokens,
                outputs=list(statistics.outputs),
                seconds=round(time.perf_counter() - start, 3),
            )
    lines = [journal.lines[block] for block in blocks]
    outputs = [layer for line in lines for layer in line["outputs"]]
    return {"tokens": lines[-1]["tokens"], "outputs": outputs, "samples": samples.ids}


def record_moments(
    block: Block, layers: Iterable[str], whole: bool, *, stay: bool = False
) -> Statistics:
    """Run the block, or with `stay` only look at it, and sum the second moments of its layers.

    Raises:
        ConfigError: no token reaches one of them.
    """
    linears = linears_of(block, layers)
    weights = {name: linear.weight for name, linear in linears.items()}
    statistics = Statistics()
    go = block.look if stay else block.run
    with InputRecorder(linears) as taken:
        go(lambda mask: statistics.add(taken.rows(mask), weights, whole))
    for name in linears:
        if name not in statistics.sites and name not in statistics.outputs:
            raise ConfigError(
                f"calibration: no sample reaches {name}, as text reaches no layer of a vision "
                "tower; set calibration=downstream_64 and a task with images, or "
                "model.emulator_targets to layers that are reached"
            )
    return statistics


def linears_of(block: Block, layers: Iterable[str]) -> dict[str, nn.Linear]:
    """Full name -> module, for layers of this block."""
    found = {name: block.module.get_submodule(name[len(block.name) + 1 :]) for name in layers}
    return {name: module for name, module in found.items() if isinstance(module, nn.Linear)}
