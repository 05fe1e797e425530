"""Each layer fitted to the inputs it gets from what was compressed before it.

Two walks over the same samples in lock step: the original model on its own hidden states, and the
model whose layers so far are their factors on the hidden states these give. Of every batch, a layer
is then known by the rows it takes in both, X and X'.

Within a block as well, where query, key and value come before the output projection. Fitted to one
look at the block as it was, each of its layers would make good the same drift once more: on
SmolLM2-135M such an emulator is far worse than one that is blind to the drift.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from emloc.calibration.blockwise import Batch, Block, iterate_checkpoint
from emloc.calibration.calibrate import linears_of
from emloc.calibration.moments import PIECE, InputRecorder
from emloc.emulators import Ranks
from emloc.emulators.svd.factor_file import load_factors
from emloc.emulators.svd.factors import LayerFactors, reduced
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import Source
from emloc.precision import Precision
from emloc.tensors.linalg.gram import cross, gram
from emloc.tensors.linalg.regression import regressed
from emloc.tensors.nn.factorized import Factorized, PackedFactorized


@dataclass(frozen=True)
class BlockPair:
    """One block in front of which both models stand, with its original weights in each."""

    original: Block
    compressed: Block  # of the model whose layers so far are their factors


@dataclass(frozen=True)
class SharedInput:
    """The layers that take one tensor, and the second moments of its rows in both models."""

    layers: Sequence[str]
    input_gram: Tensor  # X'^T X' (n, n) float64
    drift: Tensor  # (X - X')^T X' (n, n) float64


def lock_step(
    source: Source,
    batches: Sequence[Batch],
    blocks: Mapping[str, Sequence[str]],
    file: Callable[[str], Path],
    precision: Precision | None,
    device: torch.device,
    host_bytes: int | None,
    folder: Path,
) -> Iterator[tuple[str, BlockPair]]:
    """Yield block after block, by name; before going on, put its factors in place.

    Args:
        source: the original.
        batches: as `walk` takes them.
        blocks: block -> its layers that are compressed.
        file: block -> where its factors lie by the time that the next block is asked for.
        precision: in which these are.
        device: where both models run; one block of each is there at a time.
        host_bytes: what the hidden states of both may take of host memory; None for no limit.
        folder: where they take disk beyond that.

    Raises:
        ConfigError: the disk is full.
    """
    room = None if host_bytes is None else host_bytes // 2
    walks = [
        iterate_checkpoint(source, batches, list(blocks), device, host_bytes=room, folder=folder)
        for _ in range(2)
    ]
    # Strict, so that both come to their end.
    for original, compressed in zip(*walks, strict=True):
        yield original.name, BlockPair(original, compressed)
        linears = linears_of(compressed, blocks[compressed.name])
        biases = {layer: linear.bias for layer, linear in linears.items()}
        made = load_factors(file(compressed.name), biases, device, precision)
        for layer, module in made.items():
            _put(compressed, layer, module)


def fit(
    both: BlockPair,
    layers: Sequence[str],
    ranks: Ranks,
    algorithm: str,
    precision: Precision | None,
) -> dict[str, LayerFactors]:
    """Layer -> factors that make of the compressed model's rows what the original makes of its own.

    Their product is the regression of the original outputs on the new inputs, its rank reduced by
    the energy of what it gives for these inputs. They are left in the compressed model's block.

    Raises:
        ConfigError: one of the layers is never run.
    """
    linears = linears_of(both.compressed, layers)
    found: dict[str, LayerFactors] = {}
    while waiting := [layer for layer in layers if layer not in found]:
        site = _first(both, waiting)
        start = time.perf_counter()
        weights = [linears[layer].weight for layer in site.layers]
        # Together, as they share the matrix that is inverted.
        target = regressed(torch.cat(weights), site.input_gram, site.drift)
        targets = torch.split(target, [len(weight) for weight in weights])
        for layer, target, weight in zip(site.layers, targets, weights, strict=True):
            grams = {"input_gram": site.input_gram}
            factors, v = reduced(target, ranks[layer], grams, algorithm, precision, weight.dtype)
            now = time.perf_counter()
            found[layer] = LayerFactors(factors, now - start, v)
            start = now
            _put(both.compressed, layer, _module(found[layer], linears[layer].bias))
    return found


def _first(both: BlockPair, layers: Sequence[str]) -> SharedInput:
    """Look at the block in both models and sum what the first of the layers to be run takes."""
    site: SharedInput | None = None
    originals, others = (linears_of(block, layers) for block in (both.original, both.compressed))
    with InputRecorder(originals) as in_original, InputRecorder(others) as in_compressed:
        for masks in zip(both.original.looks(), both.compressed.looks(), strict=True):
            before, after = in_original.rows(masks[0]), in_compressed.rows(masks[1])
            if site is None and after:
                rows = next(iter(after.values()))  # they come as they were taken
                zeros = (rows.new_zeros((rows.shape[1],) * 2, dtype=torch.float64) for _ in "CD")
                site = SharedInput([layer for layer in after if after[layer] is rows], *zeros)
            if site is not None:
                _add(site, before[site.layers[0]], after[site.layers[0]])
    if site is None:
        raise ConfigError(
            f"{layers[0]}: no calibration sample runs it, so there is nothing to fit it to; "
            "set emulator.sequential=false emulator.aware=false, or model.emulator_targets"
        )
    return site


def _add(site: SharedInput, original: Tensor, compressed: Tensor) -> None:
    """Count one batch (N, n), as the layers take it in both models."""
    for x, rows in zip(torch.split(original, PIECE), torch.split(compressed, PIECE), strict=True):
        gram(rows, total=site.input_gram)
        # Of 16-bit rows the difference would be rounded once more.
        wide = torch.promote_types(rows.dtype, torch.float32)
        cross(x.to(wide) - rows.to(wide), rows, total=site.drift)


def _module(one: LayerFactors, bias: Tensor | None) -> nn.Module:
    """The layer as it will be read from its file."""
    if one.v is None:
        return Factorized(one.factors.u, one.factors.v, bias)
    return PackedFactorized(one.v, one.v.precision.quantize(one.factors.u.T), bias)


def _put(block: Block, layer: str, module: nn.Module) -> None:
    block.module.set_submodule(layer[len(block.name) + 1 :], module)
