"""EMLoC as a library for a training script of your own: models in memory, PEFT, any trainer.

emulator = emloc.build_emulator(model, batches, ratio=0.25)
tuned = get_peft_model(emulator, LoraConfig(...))
...                                      # train `tuned` with anything
emloc.correct(tuned, model, emulator).save("adapter")
model = PeftModel.from_pretrained(model, "adapter")
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from emloc.adapters.saved import SavedLora, lora_of, read_lora
from emloc.calibration.blockwise import Block, by_block, iterate_blocks
from emloc.calibration.calibrate import record_moments
from emloc.emulators.size import ranks_at
from emloc.emulators.svd.factors import factorize, refine
from emloc.errors import ConfigError
from emloc.models.coverage import no_linear_reason, require_linear_blocks
from emloc.recovery.correction import Correction, moments_by_layer
from emloc.tensors.linalg.correct import ActivationMoments, LoraPair
from emloc.tensors.nn.factorized import Factorized
from emloc.tensors.nn.surgery import with_modules

Batch = Mapping[str, Any]
Model = TypeVar("Model", bound=nn.Module)


def build_emulator(
    model: Model,
    batches: Sequence[Batch],
    ratio: float,
    *,
    targets: str | None = None,
    multiple: int = 1,
) -> Model:
    """Build an emulator of `model`, a smaller model to train a LoRA on (EMLoC paper, stage 1).

    Args:
        model: any transformer whose blocks consist of `nn.Linear` layers; it is not changed.
        batches: a few dozen samples of the task, as keyword arguments of `model.forward`. Padding
            is ignored in batches with an `attention_mask`.
        ratio: share of the compressed layers' parameters to keep, in (0, 1).
        targets: regular expression that has to match the full name of a layer; default: every
            linear layer in a numbered block.
        multiple: ranks are rounded down to a multiple of this number.

    Returns:
        A model of the same class, which shares all uncompressed parameters with `model`.

    Raises:
        ConfigError: no layer matches, most parameters of the blocks are in no linear layer,
            `batches` is empty or has padding alone, or the ratio leaves a layer without rank.
    """
    layers = _target_linears(model, targets)
    require_linear_blocks(model, by_block(layers), "build_emulator", "pass another model")
    if not batches:
        raise ConfigError(
            "batches is empty: an emulator is built from samples of the task; pass a few dozen"
        )
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    ranks = ranks_at(ratio, shapes, multiple)
    blocks = by_block(layers)
    statistics = {
        block.name: record_moments(block, blocks[block.name], inputs_only=False)
        for block in _iterate_blocks(model, batches, blocks)
    }
    modules: dict[str, nn.Module] = {}
    for block in _iterate_blocks(model, batches, blocks):
        names, block_statistics = blocks[block.name], statistics.pop(block.name)
        weights = {name: layers[name].weight for name in names}
        factorized = factorize(weights, ranks, block_statistics, "subspace")
        names_to_refine = [name for name in names if name in block_statistics.outputs]
        factorized = refine(block, factorized, names_to_refine)
        for name in names:
            factors = factorized[name].factors
            modules[name] = Factorized(factors.u, factors.v, layers[name].bias)
    emulator = with_modules(model, modules)
    assert isinstance(emulator, type(model))
    return emulator


def correct(
    adapter: nn.Module | str | Path,
    model: nn.Module,
    emulator: nn.Module,
    *,
    metric: str = "identity",
    clamp: float | None = 3.0,
    strength: float = 1.0,
    batches: Sequence[Batch] | None = None,
) -> SavedLora:
    """Correct a LoRA that was trained on `emulator` for `model` (EMLoC paper, stage 3).

    Args:
        adapter: the trained PEFT model, or the folder that it was saved to.
        model: the original model that was passed to `build_emulator`.
        emulator: the emulator that `build_emulator` returned.
        metric: `identity` is the paper's correction; `covariance` weights input directions by
            their second moments over `batches`.
        clamp: bound on the correction of each rank direction (lambda in the paper); 0 disables the
            correction, None the bound.
        strength: factor on the clamped correction, in [0, 1].
        batches: samples as for `build_emulator`; only for the covariance metric.

    Returns:
        The adapter for `model`; its `save(folder)` writes files for `PeftModel.from_pretrained`.

    Raises:
        ConfigError: a setting is out of range, or the adapter has been recovered before.
    """
    recovery = Correction(metric=metric, clamp=clamp, strength=strength)
    if (metric == "covariance") != (batches is not None):
        raise ConfigError("batches belong to metric='covariance': pass both or neither")
    trained = read_lora(Path(adapter)) if isinstance(adapter, str | Path) else lora_of(adapter)
    factorized_layers = _factorized_layers(emulator)
    moments: dict[str, ActivationMoments] = {}
    if batches is not None:
        compressed = {n: pair for n, pair in trained.pairs.items() if n in factorized_layers}
        block_iterator = _iterate_blocks(model, batches, by_block(compressed))
        moments = moments_by_layer(block_iterator, compressed)

    def correct_layer(layer: str, pair: LoraPair) -> LoraPair:
        if layer not in factorized_layers:
            return pair
        weight = model.get_submodule(layer).get_parameter("weight")
        residual = (weight.double() - factorized_layers[layer].product()).cpu()
        return recovery.correct(pair, residual, moments.get(layer))[0]

    return trained.map(correct_layer, {"by": "correction", "metric": metric, "clamp": clamp})


def _target_linears(model: nn.Module, targets: str | None) -> dict[str, nn.Linear]:
    """Return the linear layers whose full name matches `targets`, by name.

    Raises:
        ConfigError: no linear layer matches.
    """
    pattern = re.compile(targets or r".*\.\d+\..*")
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and pattern.fullmatch(name)
    }
    if not linears:
        if reason := no_linear_reason(model):
            raise ConfigError(f"the model cannot be emulated: {reason}; pass another model")
        raise ConfigError(f"targets={pattern.pattern!r} matches no linear layer of the model")
    return linears


def _factorized_layers(emulator: nn.Module) -> dict[str, Factorized]:
    """Return the factorised layers of an emulator by their names in the original model."""
    # PEFT replaces an adapted layer by a module of its own, with the layer as its `base_layer`.
    return {
        name.removesuffix(".base_layer").removeprefix("base_model.model."): module
        for name, module in emulator.named_modules()
        if isinstance(module, Factorized)
    }


def _iterate_blocks(
    model: nn.Module, batches: Sequence[Batch], blocks: Mapping[str, Any]
) -> Iterator[Block]:
    """Run a blockwise forward over the batches, with the model in eval mode meanwhile."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        yield from iterate_blocks(model, batches, list(blocks), device)
    finally:
        model.train(was_training)
