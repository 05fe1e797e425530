"""EMLoC inside somebody else's training script: models in memory, PEFT, any trainer.

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
    """A small stand-in for `model` to train a LoRA through (EMLoC, stage 1).

    Args:
        model: any transformer whose blocks are made of `nn.Linear`; it is left as it is.
        batches: a few dozen samples of the task, as keyword arguments of `model.forward`; padding
            is left out where they have an `attention_mask`.
        ratio: share of the compressed layers' parameters to keep, in (0, 1).
        targets: regular expression on full layer names; default: every linear in a numbered block.
        multiple: ranks are rounded down to a multiple of this.

    Returns:
        A model of the same class that shares every parameter that is not compressed.

    Raises:
        ConfigError: no layer matches, there are no batches, or the ratio leaves a layer no rank.
    """
    layers = _linears(model, targets)
    if not batches:
        raise ConfigError("batches is empty: an emulator is built from samples of the task")
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    ranks = ranks_at(ratio, shapes, multiple)
    blocks = by_block(layers)
    statistics = {
        block.name: record_moments(block, blocks[block.name], whole=False)
        for block in _walk(model, batches, blocks)
    }
    modules: dict[str, nn.Module] = {}
    for block in _walk(model, batches, blocks):
        members, known = blocks[block.name], statistics.pop(block.name)
        weights = {name: layers[name].weight for name in members}
        found = factorize(weights, ranks, known, "subspace")
        found = refine(block, found, [name for name in members if name in known.outputs])
        for name in members:
            factors = found[name].factors
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
    """Carry a LoRA trained on `emulator` to `model` (EMLoC, stage 3).

    Args:
        adapter: the PEFT model that was trained, or the folder it was saved to.
        model: the original, as it was given to `build_emulator`.
        emulator: what `build_emulator` returned.
        metric: `identity` is the paper's; `covariance` weighs directions as `batches` do.
        clamp: the paper's lambda, per rank direction; 0 for no correction, None for no clamp.
        strength: multiplies the clamped correction, in [0, 1].
        batches: for the covariance metric, samples as in `build_emulator`.

    Returns:
        The adapter for `model`; `save(folder)` writes what `PeftModel.from_pretrained` loads.

    Raises:
        ConfigError: a setting cannot be right, or the adapter has been carried before.
    """
    recovery = Correction(metric=metric, clamp=clamp, strength=strength)
    if (metric == "covariance") != (batches is not None):
        raise ConfigError("batches belong to metric='covariance': give both or neither")
    trained = read_lora(Path(adapter)) if isinstance(adapter, str | Path) else lora_of(adapter)
    moments: dict[str, ActivationMoments] = {}
    if batches is not None:
        run = _walk(model, batches, by_block(trained.pairs))
        moments = moments_by_layer(run, trained.pairs)
    factors = _factorized(emulator)

    def change(layer: str, pair: LoraPair) -> LoraPair:
        if layer not in factors:
            return pair
        weight = model.get_submodule(layer).get_parameter("weight")
        gap = (weight.double() - factors[layer].product()).cpu()
        return recovery.correct(pair, gap, moments.get(layer))[0]

    return trained.map(change, {"by": "correction", "metric": metric, "clamp": clamp})


def _linears(model: nn.Module, targets: str | None) -> dict[str, nn.Linear]:
    pattern = re.compile(targets or r".*\.\d+\..*")
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and pattern.fullmatch(name)
    }
    if not found:
        raise ConfigError(f"targets={pattern.pattern!r} matches no linear layer of the model")
    return found


def _factorized(emulator: nn.Module) -> dict[str, Factorized]:
    # A PEFT model holds each adapted layer as `base_layer` of its own.
    return {
        name.removesuffix(".base_layer").removeprefix("base_model.model."): module
        for name, module in emulator.named_modules()
        if isinstance(module, Factorized)
    }


def _walk(model: nn.Module, batches: Sequence[Batch], blocks: Mapping[str, Any]) -> Iterator[Block]:
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        yield from iterate_blocks(model, batches, list(blocks), device)
    finally:
        model.train(training)
