"""Stage 1a: run the original model over the calibration samples and store second moments."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from emloc.calibration.blockwise import Block, by_block, iterate_checkpoint
from emloc.calibration.moments import InputRecorder, Statistics
from emloc.calibration.offload import UNLIMITED, StateLimits
from emloc.calibration.samples import Samples
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import Source
from emloc.runtime.journal import Journal
from emloc.runtime.progress import tracked

# Layer name -> (output features, input features).
Layers = dict[str, tuple[int, int]]


class UnreachedLayerError(ConfigError):
    """No token of the calibration samples reaches the layer `layer`."""

    def __init__(self, layer: str) -> None:
        super().__init__(
            f"calibration: no sample reaches {layer}; samples without images, for one, "
            "reach no layer of a vision tower: set calibration=downstream_64 and a task with "
            "images, or set model.emulator_targets to other layers"
        )
        self.layer = layer


def statistics_bytes(layers: Layers, inputs_only: bool, joint: Collection[str] = ()) -> int:
    """Upper bound on the bytes of all second moments in float64; see `calibrate`.

    The bound ignores that layers with a common input share one input Gram.
    """
    sides = (n if inputs_only or layer in joint else min(m, n) for layer, (m, n) in layers.items())
    return sum(8 * side * side for side in sides)


def calibrate(
    folder: Path,
    source: Source,
    layers: Layers,
    samples: Samples,
    inputs_only: bool,
    *,
    device: torch.device,
    limits: StateLimits = UNLIMITED,
    joint: Collection[str] = (),
) -> dict[str, Any]:
    """Write one file of second moments per block, with a line per block in `journal.jsonl`.

    An interrupted calibration resumes with the next unfinished block. Finished blocks are run
    again, because the next block needs their outputs, but their moments are not summed again.

    Args:
        folder: folder of the files.
        source: checkpoint of the original model.
        layers: layers to record.
        samples: calibration samples.
        inputs_only: record an input Gram for every layer. Otherwise a layer whose outputs have
            fewer features than its inputs gets an output Gram.
        device: device that runs the model.
        limits: memory for hidden states; the rest is offloaded to disk.
        joint: layers that get an input Gram in any case.

    Returns:
        Number of tokens, names of the layers with an output Gram, ids of the samples.
    """
    blocks = by_block(layers)
    run = iterate_checkpoint(
        source,
        samples.batches(source, device),
        list(blocks),
        device,
        limits=limits,
        folder=folder,
    )
    journal = Journal(folder)
    for block in tracked(run, "calibrate", len(blocks), "block"):
        if block.name not in journal.lines:
            start = time.perf_counter()
            statistics = record_moments(block, blocks[block.name], inputs_only, joint=joint)
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
    block: Block,
    layers: Iterable[str],
    inputs_only: bool,
    *,
    peek: bool = False,
    joint: Collection[str] = (),
) -> Statistics:
    """Run the block on all batches and return the second moments of its layers.

    See `sum_moments`.

    Raises:
        UnreachedLayerError: no token reaches one of the layers.
        ConfigError: values of one of the layers are NaN or infinite.
    """
    names = list(layers)
    statistics = sum_moments(block, names, inputs_only, peek=peek, joint=joint)
    for name in linears_of(block, names):
        if name not in statistics.sites and name not in statistics.outputs:
            raise UnreachedLayerError(name)
    return statistics


def sum_moments(
    block: Block,
    layers: Iterable[str],
    inputs_only: bool,
    *,
    peek: bool = False,
    joint: Collection[str] = (),
) -> Statistics:
    """Run the block and return the second moments of those of its layers that a token reaches.

    With `peek` the batches stay at the entry of the block, so that it can be run again. See
    `calibrate` for `inputs_only` and `joint`.

    Raises:
        ConfigError: values of one of the layers are NaN or infinite.
    """
    linears = linears_of(block, layers)
    weights = {name: linear.weight for name, linear in linears.items()}
    statistics = Statistics()
    run_block = block.peek if peek else block.run
    with InputRecorder(linears) as recorder:
        run_block(lambda mask: statistics.add(recorder.rows(mask), weights, inputs_only, joint))
    if overflowing := statistics.overflowing():
        raise ConfigError(
            f"calibration: the inputs or outputs of {overflowing[0]} in block {block.name} have "
            "NaN or infinite values; set model.dtype=bfloat16 or float32, or model.source to "
            "another checkpoint"
        )
    return statistics


def linears_of(block: Block, layers: Iterable[str]) -> dict[str, nn.Linear]:
    """Full name -> module, for the `nn.Linear` modules of the block among `layers`.

    Of an adapted layer this is the original one, which PEFT keeps as its `base_layer`.
    """
    modules = {name: block.module.get_submodule(name[len(block.name) + 1 :]) for name in layers}
    modules = {name: getattr(module, "base_layer", module) for name, module in modules.items()}
    return {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
