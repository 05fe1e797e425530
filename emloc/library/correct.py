"""Correct a LoRA that was trained on an emulator, for the original model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from emloc.adapters.recoverable import has_adapter, require_plain_lora
from emloc.adapters.saved import SavedLora, lora_of, read_lora
from emloc.calibration.blockwise import Batch, by_block
from emloc.errors import ConfigError
from emloc.library.arguments import (
    base_model,
    batches_of,
    emulator_and_stamp,
    original_model,
    require_finite,
    unwrapped,
)
from emloc.library.emulate import blocks_of, eval_mode
from emloc.library.identity import (
    Stamp,
    factorized_layers,
    is_anchored,
    require_original,
    require_trained_on,
    stamp_of,
)
from emloc.recovery.correction import Correction, moments_by_layer
from emloc.tensors.linalg.correct import ActivationMoments, LoraPair
from emloc.tensors.nn.factorized import Factorized


def correct(
    adapter: nn.Module | str | Path,
    model: nn.Module,
    emulator: nn.Module,
    *,
    metric: str = "identity",
    clamp: float | None = 3.0,
    strength: float = 1.0,
    batches: Iterable[Batch] | None = None,
) -> SavedLora:
    """Correct a LoRA that was trained on `emulator` for `model` (EMLoC paper, stage 3).

    Args:
        adapter: the trained PEFT model, of which the active adapter is taken, or the folder that
            it was saved to.
        model: the original model that was passed to `build_emulator`, on any device.
        emulator: the emulator that `build_emulator` or `load_emulator` returned, on any device.
        metric: `identity` is the paper's correction; `covariance` weights input directions by
            their second moments over `batches`.
        clamp: bound on the correction of each rank direction (lambda in the paper); 0 disables the
            correction, as an adapter needs that was trained with `anchor`; None the bound.
        strength: factor on the clamped correction, in [0, 1].
        batches: samples as for `build_emulator`; only for the covariance metric.

    Returns:
        The adapter for `model`; its `save(folder)` writes files for `PeftModel.from_pretrained`.

    Raises:
        ConfigError: a setting is out of range, the three do not belong together, several adapters
            are active, or the adapter is no plain LoRA, is not finite, was corrected before or was
            trained with anchors.
    """
    recovery = Correction(metric=metric, clamp=clamp, strength=strength)
    if (metric == "covariance") != (batches is not None):
        raise ConfigError("batches belong to metric='covariance': pass both or neither")
    emulated, stamp = emulator_and_stamp(emulator)
    original = original_model(model)
    trained = _trained_lora(adapter, stamp)
    if clamp != 0 and strength != 0:
        _refuse_anchored(adapter)
    layers = factorized_layers(emulated)
    _require_layers(trained, original)
    parameters = [f"{name}.weight" for name in dict.fromkeys([*trained.pairs, *layers])]
    require_original(original, stamp, parameters)
    moments: dict[str, ActivationMoments] = {}
    if batches is not None:
        pairs = {name: pair for name, pair in trained.pairs.items() if name in layers}
        moments = _moments(original, batches_of(batches, original), pairs)

    def correct_layer(layer: str, pair: LoraPair) -> LoraPair:
        if layer not in layers:
            return pair
        weight = original.get_submodule(layer).get_parameter("weight")
        residual = residual_of(weight, layers[layer]).cpu()
        return recovery.correct(pair, residual, moments.get(layer))[0]

    origin = {"by": "correction", "metric": metric, "clamp": clamp, "strength": strength}
    recovered = trained.map(correct_layer, origin | {"emulator": stamp.digest})
    # An empty name and not None: PEFT would fill in the name of the model that it saves later.
    return replace(recovered, config=trained.config | {"base_model_name_or_path": stamp.base})


def residual_of(weight: Tensor, layer: Factorized) -> Tensor:
    """Original weight minus the product of the factors, in float64 on one of their two devices."""
    device = weight.device if weight.device.type != "cpu" else layer.u.device
    product = layer.u.to(device).double() @ layer.v.to(device).double()
    return weight.detach().to(device).double() - product


def _trained_lora(adapter: Any, stamp: Stamp) -> SavedLora:
    """Return the adapter as it was trained on the emulator with this stamp.

    Raises:
        ConfigError: it is no plain LoRA, was trained on another model, or was corrected before.
    """
    if isinstance(adapter, str | Path):
        trained, where = read_lora(Path(adapter)), str(adapter)
    elif isinstance(adapter, nn.Module):
        name = _require_adapter_of(base_model(adapter), stamp)
        trained, where = lora_of(unwrapped(adapter)), f"adapter {name!r}"
    else:
        raise ConfigError(
            "adapter must be the trained PEFT model or the folder of one, got "
            f"{type(adapter).__name__}"
        )
    trained.require_as_trained()
    require_trained_on(trained.config, stamp, where)
    return trained


def _refuse_anchored(adapter: Any) -> None:
    """Refuse to correct an adapter in memory that was trained with anchors.

    Raises:
        ConfigError: it was.
    """
    if isinstance(adapter, nn.Module):
        base = base_model(adapter)
        if is_anchored(base, require_plain_lora(base)[0]):
            raise ConfigError(
                "adapter was trained with the anchors of emloc.anchor, so it learnt what the "
                "original lacks and there is nothing to correct; pass clamp=0, which copies it"
            )


def _require_adapter_of(base: nn.Module, stamp: Stamp) -> str:
    """Return the name of the plain LoRA that is active in `base`, the emulator with this stamp.

    Raises:
        ConfigError: `base` has no adapter, is another model, or its adapter is no plain LoRA.
    """
    if not has_adapter(base):
        raise ConfigError("adapter must be a PEFT model with a LoRA, or the folder of one")
    own = stamp_of(base)
    if own is None:
        raise ConfigError(
            "adapter is attached to a model that is no emulator; pass the model that "
            "peft.get_peft_model(emulator, ...) returned, or the folder that it was saved to"
        )
    if own.digest != stamp.digest:
        raise ConfigError(
            f"adapter is attached to the emulator {own.digest} (ratio {own.ratio:g}), and emulator "
            f"is {stamp.digest} (ratio {stamp.ratio:g}); pass the one that it was trained on"
        )
    return require_plain_lora(base)[0]


def _require_layers(trained: SavedLora, model: nn.Module) -> None:
    """Check that every tensor of the adapter fits `model` and is finite.

    Raises:
        ConfigError: a layer or parameter is missing or has another shape, or a number is not
            finite.
    """
    modules, own = dict(model.named_modules()), dict(model.named_parameters(remove_duplicate=False))
    for name, pair in trained.pairs.items():
        layer, shape = modules.get(name), (pair.b.shape[0], pair.a.shape[1])
        if not isinstance(layer, nn.Linear) or tuple(layer.weight.shape) != shape:
            raise ConfigError(
                f"adapter: the LoRA of {name} fits a linear layer of shape {shape}, which the "
                "model does not have; pass the adapter and the model that belong together"
            )
        require_finite(name, pair.a, pair.b)
    for name, tensor in trained.extras.items():
        if name not in own or own[name].shape != tensor.shape:
            raise ConfigError(
                f"adapter: {name} with shape {tuple(tensor.shape)} was trained in full, and the "
                "model has no such parameter; leave it out of modules_to_save"
            )
        require_finite(name, tensor)


def _moments(
    model: nn.Module, batches: Sequence[Batch], pairs: Mapping[str, LoraPair]
) -> dict[str, ActivationMoments]:
    """Layer name -> moments of its activations over the batches."""
    with eval_mode(model):
        return moments_by_layer(blocks_of(model, batches, by_block(pairs)), pairs)
