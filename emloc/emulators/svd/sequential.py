"""Sequential build: fit each layer to the inputs that earlier compressed layers produce.

Two blockwise forwards over the same samples run in lock step: one of the original model, one of
the model whose earlier layers are already replaced by their factors. For every batch, a layer's
input rows are recorded in both: X in the original and X' in the compressed model.

Layers within a block are also fitted one after another: query, key and value before the output
projection. If all layers of a block were fitted to inputs of the uncompressed block, each of them
would correct the same drift of X' from X again. On SmolLM2-135M that emulator is far worse than one
that ignores the drift.
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
from emloc.calibration.offload import StateLimits
from emloc.emulators import Ranks
from emloc.emulators.size import Groups
from emloc.emulators.svd.factor_file import load_factors
from emloc.emulators.svd.factors import (
    LayerFactors,
    factorize_matrix,
    other_input,
    split_group,
    stacked,
)
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import Source
from emloc.precision import Precision
from emloc.tensors.linalg.gram import cross, gram
from emloc.tensors.linalg.regression import regress_weight
from emloc.tensors.nn.factorized import Factorized, PackedFactorized


@dataclass(frozen=True)
class BlockPair:
    """The next block to run, in the original and in the compressed model.

    Both copies have the original weights when the pair is created.
    """

    original: Block
    compressed: Block  # earlier layers of this model are already factorised


@dataclass(frozen=True)
class SharedInput:
    """Layers that read the same input tensor, and the second moments of its rows X and X'."""

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
    limits: StateLimits,
    folder: Path,
) -> Iterator[tuple[str, BlockPair]]:
    """Yield every block by name as a pair; then load its factors and run the next blocks on them.

    The caller writes a block's factors to `file(name)` before it asks for the next block.

    Args:
        source: the original model.
        batches: of calibration samples, as for `iterate_checkpoint`.
        blocks: block name -> names of its layers to compress.
        file: block name -> path of the file of its factors.
        precision: packed format of these files; None: the model's dtype.
        device: where both models run, one block of each at a time.
        limits: memory for the hidden states of both models together.
        folder: hidden states beyond this limit are written here.

    Raises:
        ConfigError: the disk is full.
    """
    runs = [
        iterate_checkpoint(
            source, batches, list(blocks), device, limits=limits.halved, folder=folder
        )
        for _ in range(2)
    ]
    # `strict` also exhausts the second run, so that it finishes and cleans up.
    for original, compressed in zip(*runs, strict=True):
        yield original.name, BlockPair(original, compressed)
        linears = linears_of(compressed, blocks[compressed.name])
        biases = {layer: linear.bias for layer, linear in linears.items()}
        modules = load_factors(file(compressed.name), biases, device, precision)
        for layer, module in modules.items():
            _replace_layer(compressed, layer, module)


def fit_block(
    pair: BlockPair,
    groups: Groups,
    ranks: Ranks,
    algorithm: str,
    precision: Precision | None,
) -> dict[str, LayerFactors]:
    """Layer name -> factors that reproduce the original outputs from the compressed model's inputs.

    The product of a layer's factors is the reduced-rank regression of the original outputs on the
    inputs X'. The compressed block gets the factors at once, so later layers are fitted to them.

    Args:
        pair: the block in both models.
        groups: names of the layers to compress; those of a group get one v.
        ranks: layer name -> rank.
        algorithm: eigen or subspace.
        precision: packed format of the factors; None: the model's dtype.

    Raises:
        ConfigError: no calibration sample reaches one of the layers, or the layers of a group read
            different inputs.
    """
    layers = [layer for names in groups for layer in names]
    linears = linears_of(pair.compressed, layers)
    fitted: dict[str, LayerFactors] = {}
    while remaining := [layer for layer in layers if layer not in fitted]:
        shared = _next_input(pair, remaining)
        start = time.perf_counter()
        weights = [linears[layer].weight for layer in shared.layers]
        # One regression for all layers with this input, since they share the matrix to invert.
        whole = regress_weight(torch.cat(weights), shared.input_gram, shared.drift)
        rows = torch.split(whole, [len(weight) for weight in weights])
        targets = dict(zip(shared.layers, rows, strict=True))
        grams = {"input_gram": shared.input_gram}
        for names in _groups_within(groups, shared.layers):
            parts = [targets[name] for name in names]
            factors, v = factorize_matrix(
                *(stacked(parts), ranks[names[0]], grams, algorithm, precision, weights[0].dtype)
            )
            now = time.perf_counter()
            members = split_group(*(names, parts, factors, v, now - start, shared.input_gram))
            start = now
            fitted |= members
            for layer, member in members.items():
                _replace_layer(pair.compressed, layer, _module(member, linears[layer].bias))
    return fitted


def _groups_within(groups: Groups, layers: Sequence[str]) -> list[Sequence[str]]:
    """The groups of layers that read one input, which are all the `layers`.

    Raises:
        ConfigError: a group has another layer, too.
    """
    within = [names for names in groups if not set(names).isdisjoint(layers)]
    for names in within:
        if other := next((name for name in names if name not in layers), None):
            first = next(name for name in names if name in layers)
            raise other_input(other, first)
    return within


def _next_input(pair: BlockPair, layers: Sequence[str]) -> SharedInput:
    """Run the block in both models; sum the moments of the input of whichever layer runs first.

    The result also names the other `layers` that read the same tensor.
    """
    shared: SharedInput | None = None
    originals, others = (linears_of(block, layers) for block in (pair.original, pair.compressed))
    with InputRecorder(originals) as in_original, InputRecorder(others) as in_compressed:
        for masks in zip(pair.original.peek_batches(), pair.compressed.peek_batches(), strict=True):
            before, after = in_original.rows(masks[0]), in_compressed.rows(masks[1])
            if shared is None and after:
                rows = next(iter(after.values()))  # of the layer that ran first
                zeros = (rows.new_zeros((rows.shape[1],) * 2, dtype=torch.float64) for _ in "CD")
                shared = SharedInput([layer for layer in after if after[layer] is rows], *zeros)
            if shared is not None:
                _add(shared, before[shared.layers[0]], after[shared.layers[0]])
    if shared is None:
        raise ConfigError(
            f"{layers[0]}: no calibration sample runs it, so there is nothing to fit it to; "
            "set emulator.sequential=false emulator.aware=false, or model.emulator_targets"
        )
    return shared


def _add(shared: SharedInput, original: Tensor, compressed: Tensor) -> None:
    """Add one batch of input rows, X (N, n) and X' (N, n), to the moments of a shared input."""
    for x, rows in zip(torch.split(original, PIECE), torch.split(compressed, PIECE), strict=True):
        gram(rows, total=shared.input_gram)
        # In float32, because the difference of 16-bit rows would be rounded once more.
        wide = torch.promote_types(rows.dtype, torch.float32)
        cross(x.to(wide) - rows.to(wide), rows, total=shared.drift)


def _module(layer: LayerFactors, bias: Tensor | None) -> nn.Module:
    """The factorised layer as a module, equal to the one that is read from its file."""
    u, v = layer.factors.u, layer.factors.v
    if layer.v is None:
        return Factorized(u, v, bias)
    return PackedFactorized(layer.v, layer.ut, bias)


def _replace_layer(block: Block, layer: str, module: nn.Module) -> None:
    """Replace a layer, given by its full name, inside a block's module."""
    block.module.set_submodule(layer[len(block.name) + 1 :], module)
