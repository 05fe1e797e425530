"""EMLoC's LoRA correction: subtract what the LoRA learnt only to undo the emulator's error."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn import functional

from emloc.adapters.saved import read_lora
from emloc.calibration.blockwise import Block, by_block, iterate_checkpoint
from emloc.calibration.calibrate import linears_of
from emloc.calibration.moments import InputRecorder
from emloc.calibration.padding import TokenMask
from emloc.config.values import OneOf, Range
from emloc.errors import ConfigError
from emloc.models.block_names import find_block
from emloc.models.checkpoint.source import CPU
from emloc.recovery import Recovery, RecoveryInputs
from emloc.runtime.progress import tracked
from emloc.tensors.linalg.correct import (
    ActivationMoments,
    CorrectionEffect,
    LoraPair,
    correct_covariance,
    correct_identity,
)
from emloc.tensors.linalg.gram import cross, gram, product


@dataclass(frozen=True, kw_only=True)
class Correction(Recovery):
    """Corrects B of each LoRA for the residual between original and emulator (EMLoC, stage 3)."""

    subtracts = True

    # identity: the paper; covariance: weights directions by the calibration tokens
    metric: Annotated[str, OneOf("identity", "covariance")]
    # the paper's lambda, per rank direction; 0: uncorrected, null: no clamp
    clamp: Annotated[float | None, Range(least=0, usual=3)]
    # multiplies the clamped correction, in [0, 1]
    strength: Annotated[float, Range(least=0, most=1, usual=1)]

    @property
    def statistics(self) -> bool:
        """Whether the original runs over the calibration samples (covariance metric)."""
        return self.metric == "covariance"

    def recover(self, folder: Path, inputs: RecoveryInputs) -> dict[str, Any]:
        """Write the corrected adapter, and the effect on each layer as `layers.json`.

        The layers are corrected one by one on the device. The covariance metric needs a blockwise
        forward of the original; the moments of one block are in memory at a time.

        A layer's mismatch is the mean squared difference between the outputs of the original with
        its adapter and the emulator with its adapter. The inputs are those of the calibration
        tokens (covariance metric), or white with unit variance (identity metric). The mismatch
        after the correction is a prediction.
        """
        built_emulator, samples, device = inputs.built_emulator, inputs.samples, inputs.device
        adapter = read_lora(inputs.trained.folder / "adapter")
        pairs, blocks = adapter.pairs, None
        if samples is not None:
            # The LoRA of a layer outside the blocks, such as a projector, needs no moments.
            pairs = {
                name: pair
                for name, pair in pairs.items()
                if find_block(name) is not None or built_emulator.residual(name, device) is not None
            }
            blocks = iterate_checkpoint(
                built_emulator.source,
                samples.batches(built_emulator.source, device),
                list(by_block(pairs)),
                device,
                limits=inputs.limits,
                folder=folder,
            )
        corrected: dict[str, LoraPair] = {}
        corrections: dict[str, LayerCorrection] = {}
        layers = _adapted_layers(
            blocks, pairs, lambda layer: built_emulator.residual(layer, device)
        )
        for layer in tracked(layers, "recover", len(pairs), "layer"):
            if layer.residual is not None:
                pair = _on_device(adapter.pairs[layer.name], device)
                pair, effect = self.correct(pair, layer.residual, layer.moments)
                corrected[layer.name] = _on_device(pair, CPU)
                corrections[layer.name] = LayerCorrection(effect, _mismatch_as_trained(layer))
        recovered = adapter.map(
            lambda name, pair: corrected.get(name, pair), {"by": "correction", **asdict(self)}
        )
        recovered.save(folder / "adapter")
        table = {name: corrections[name].facts for name in adapter.pairs if name in corrections}
        (folder / "layers.json").write_text(json.dumps(table, indent=1))
        facts = {"corrected_layers": len(corrections), **_summary(list(corrections.values()))}
        return facts | ({"samples": samples.ids} if samples is not None else {})

    def correct(
        self, pair: LoraPair, residual: Tensor, moments: ActivationMoments | None
    ) -> tuple[LoraPair, CorrectionEffect]:
        """Correct one layer's LoRA, by the covariance metric if `moments` is given."""
        if moments is None:
            return correct_identity(pair, residual, clamp=self.clamp, strength=self.strength)
        return correct_covariance(pair, residual, moments, clamp=self.clamp, strength=self.strength)


@dataclass(frozen=True)
class AdaptedLayer:
    """An adapted layer with its residual and the activation moments of the calibration tokens."""

    name: str
    residual: Tensor | None  # original minus emulator weight (m, n); None: the weights are equal
    moments: ActivationMoments | None = None  # None: the metric does not need them
    error: float | None = None  # mean of ||residual x||^2 over the tokens; None without moments


@dataclass(frozen=True)
class LayerCorrection:
    """The effect of the correction on one layer."""

    effect: CorrectionEffect
    before: float  # mismatch of the adapter as it was trained

    @property
    def after(self) -> float:
        """Predicted mismatch of the corrected adapter, at least 0 despite rounding."""
        return max(0.0, self.before - self.effect.removed)

    @property
    def facts(self) -> dict[str, Any]:
        """The layer's entry in `layers.json`: effect, and mismatch before and after."""
        return asdict(self.effect) | {"mismatch_before": self.before, "mismatch_after": self.after}


def _mismatch_as_trained(layer: AdaptedLayer) -> float:
    """Mismatch before the correction: over the calibration tokens, or over white inputs."""
    assert layer.residual is not None
    return float(layer.residual.square().sum()) if layer.error is None else layer.error


def _adapted_layers(
    blocks: Iterable[Block] | None,
    pairs: Mapping[str, LoraPair],
    residual_of: Callable[[str], Tensor | None],
) -> Iterator[AdaptedLayer]:
    """Yield every adapted layer; with `blocks`, its activation moments too if it has a residual."""
    if blocks is None:
        yield from (AdaptedLayer(name, residual_of(name)) for name in pairs)
        return
    names_by_block = by_block(pairs)
    for block in blocks:
        residuals = {name: residual_of(name) for name in names_by_block[block.name]}
        compressed = [name for name, residual in residuals.items() if residual is not None]
        moments = _block_moments(block, {name: pairs[name] for name in compressed}, residuals)
        for name in list(residuals):
            yield AdaptedLayer(name, residuals.pop(name), *moments.pop(name, ()))


def moments_by_layer(
    blocks: Iterable[Block], pairs: Mapping[str, LoraPair]
) -> dict[str, ActivationMoments]:
    """Activation moments of every adapted layer for the covariance metric, in host memory.

    Args:
        blocks: of a blockwise forward of the original model.
        pairs: layer name -> LoRA, for the compressed layers.

    Raises:
        ConfigError: no token reaches one of the layers.
    """
    names_by_block = by_block(pairs)
    return {
        name: replace(moments, aca=moments.aca.cpu(), ca=moments.ca.cpu())
        for block in blocks
        for name, (moments, _) in _block_moments(
            block, {name: pairs[name] for name in names_by_block[block.name]}, {}
        ).items()
    }


def _block_moments(
    block: Block, pairs: Mapping[str, LoraPair], residuals: Mapping[str, Tensor | None]
) -> dict[str, tuple[ActivationMoments, float]]:
    """Run a block: layer name -> its moments and the mean of ||residual x||^2 over the tokens.

    Raises:
        ConfigError: no token reaches one of the layers.
    """
    linears = linears_of(block, pairs)
    a = {layer: pairs[layer].a.to(linear.weight.device) for layer, linear in linears.items()}
    # The error is only reported, so products in the model's dtype are exact enough.
    narrow = {
        layer: residual.to(linears[layer].weight.dtype)
        for layer, residual in residuals.items()
        if residual is not None and layer in linears
    }
    sums: dict[str, tuple[Tensor, Tensor, int]] = {}
    errors = dict.fromkeys(pairs, 0.0)

    def add(mask: TokenMask | None) -> None:
        for layer, rows in recorder.rows(mask).items():
            features = product(rows, a[layer].T)
            aca, ca, tokens = sums.get(layer, (None, None, 0))
            sums[layer] = (
                gram(features, total=aca),
                cross(rows, features, total=ca),
                tokens + len(rows),
            )
            if layer in narrow:
                lost_output = functional.linear(rows, narrow[layer])
                errors[layer] += float(lost_output.float().square().sum(dtype=torch.float64))

    with InputRecorder(linears) as recorder:
        block.run(add)
    for layer in pairs:
        if layer not in sums or not sums[layer][2]:
            raise ConfigError(
                f"recovery=correction: no calibration token reaches {layer}, so its "
                "inputs have no covariance; set recovery.metric=identity recovery.clamp=3"
            )
    return {
        layer: (ActivationMoments(aca, ca, tokens), errors[layer] / tokens)
        for layer, (aca, ca, tokens) in sums.items()
    }


def _on_device(pair: LoraPair, device: torch.device) -> LoraPair:
    """Copy of a LoRA on `device`."""
    return replace(pair, a=pair.a.to(device), b=pair.b.to(device))


def _summary(corrections: Sequence[LayerCorrection]) -> dict[str, Any]:
    """Summary over all layers, for the results of the run.

    Returns:
        `clamped`: share of all directions that the clamp shortened; `ratio`: median over layers of
        |correction| / |LoRA|; `mismatch_left`: mean over layers of the remaining share of
        mismatch, since the layers' outputs differ in size.
    """
    directions = sum(one.effect.directions for one in corrections)
    clamped = sum(one.effect.clamped * one.effect.directions for one in corrections)
    left = [one.after / one.before for one in corrections if one.before > 0]
    ratios = [one.effect.ratio for one in corrections if one.effect.ratio is not None]
    return {
        "clamped": round(clamped / directions, 4) if directions else 0.0,
        "ratio": round(statistics.median(ratios), 4) if ratios else None,
        "mismatch_left": round(statistics.mean(left), 6) if left else None,
    }
