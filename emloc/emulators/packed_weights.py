"""Packed weights of the original's linears, for emulators that keep them.

A format without error feedback quantises a weight when it is read, so the emulator's folder holds
no weights. A format with feedback needs the inputs of each layer in the original model. Its weights
are quantised when the emulator is built, block by block, and stored in one file per block.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from emloc.calibration.blockwise import block_of, by_block
from emloc.calibration.calibrate import sum_moments
from emloc.calibration.named_blocks import named_blocks, weights_of
from emloc.calibration.offload import StateLimits
from emloc.emulators import BuildInputs
from emloc.models.checkpoint.source import Source
from emloc.precision import Packed, Precision
from emloc.runtime.journal import Journal
from emloc.runtime.manifest import verified_file
from emloc.runtime.progress import tracked
from emloc.runtime.safetensors_file import write_safetensors
from emloc.runtime.work_meter import count_weights

log = logging.getLogger(__name__)

# Layer -> ascending indices of the rows and of the columns of its weight that the emulator keeps;
# None: all of them.
Selection = Callable[[str], tuple[Tensor | None, Tensor | None]]


def keep_all(_: str) -> tuple[None, None]:
    """Keep every row and column of each weight."""
    return None, None


def select(tensor: Tensor, indices: Tensor | None, dim: int) -> Tensor:
    """The entries of a tensor at `indices` along `dim`; all entries if `indices` is None."""
    return tensor if indices is None else tensor.index_select(dim, indices.to(tensor.device))


def select_both(matrix: Tensor, indices: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """The rows and columns of a matrix at `indices`; all of them where it is None."""
    rows, columns = indices
    return select(select(matrix, rows, 0), columns, 1)


def write_packed(
    folder: Path,
    source: Source,
    layers: Sequence[str],
    build_inputs: BuildInputs,
    *,
    device: torch.device,
    limits: StateLimits,
    selection: Selection = keep_all,
) -> None:
    """Quantise weights to what the original computes on the samples; one file per block.

    Does nothing for a format without error feedback. An interrupted build skips finished blocks.
    A layer that no sample reaches gets the nearest codes, and the log says so.

    Args:
        folder: of the emulator's artifact.
        source: the original model.
        layers: names of the linears.
        build_inputs: packed format and samples.
        device: where the original runs, one block at a time.
        limits: memory for hidden states.
        selection: rows and columns of each weight that the emulator keeps.

    Raises:
        ConfigError: the disk is full, or the inputs of a layer are NaN or infinite.
    """
    precision = build_inputs.precision
    if precision is None or not precision.feedback:
        return
    journal, blocks = Journal(folder), by_block(layers)
    run = named_blocks(source, build_inputs.samples, list(blocks), device, limits, folder)
    for name, block in tracked(run, "quantize", len(blocks), "block"):
        if name in journal.lines:
            continue
        start = time.perf_counter()
        assert block is not None  # there are samples
        weights = weights_of(source, block, blocks[name], device)
        grams = sum_moments(block, blocks[name], inputs_only=True)
        tensors: dict[str, Tensor] = {}
        for layer in blocks[name]:
            rows, columns = selection(layer)
            gram = None
            if layer in grams.sites:
                whole = grams.of(layer)["input_gram"]
                gram = select_both(whole, (columns, columns))
            weight = select_both(weights[layer], (rows, columns))
            packed = precision.quantize(weight, columns=gram)
            tensors |= {key: value.cpu() for key, value in packed.tensors(layer).items()}
        write_safetensors(journal.file(name), tensors, {})
        unreached = [layer for layer in blocks[name] if layer not in grams.sites]
        seconds = round(time.perf_counter() - start, 3)
        journal.add(name, unreached=unreached, seconds=seconds)
    unreached = [layer for name in blocks for layer in journal.lines[name]["unreached"]]
    if unreached:
        log.info(
            "precision=%s: no sample reaches %d layers, %s first; they get the nearest codes",
            precision.name,
            len(unreached),
            unreached[0],
        )


def packed_weight(
    source: Source,
    layer: str,
    device: torch.device,
    precision: Precision,
    folder: Path | None,
    selection: Selection = keep_all,
) -> Packed:
    """The packed weight of a layer: from the emulator's `folder`, or quantised here.

    Without a folder, a format with error feedback gives the nearest codes.
    """
    if folder is not None and precision.feedback:
        with safe_open(
            verified_file(folder / f"{block_of(layer)}.safetensors"), "pt", device=str(device)
        ) as file:
            parts = [*precision.layout(1, 1), "like"]
            tensors = {f"{layer}.{part}": file.get_tensor(f"{layer}.{part}") for part in parts}
        count_weights(sum(tensor.nbytes for tensor in tensors.values()))
        return precision.from_tensors(layer, tensors)
    return precision.quantize(select_both(source.weight(layer, device), selection(layer)))
