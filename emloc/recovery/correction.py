"""EMLoC's correction: make up for the gap between emulator and original (stage 3)."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from emloc.adapters.saved import read_lora
from emloc.calibration.blockwise import Block, by_block, iterate_checkpoint
from emloc.calibration.calibrate import linears_of
from emloc.calibration.moments import InputRecorder
from emloc.errors import ConfigError
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

METRICS = ("identity", "covariance")


@dataclass(frozen=True, kw_only=True)
class Correction(Recovery):
    """Take out of the LoRA what it learnt only to make up for the emulator's error."""

    metric: str  # identity: the paper; covariance: directions weigh as the calibration tokens do
    clamp: float | None  # the paper's lambda, per rank direction; 0: uncorrected, null: no clamp
    strength: float  # multiplies the clamped correction, in [0, 1]

    def __post_init__(self) -> None:
        where = "recovery=correction"
        if self.metric not in METRICS:
            raise ConfigError(
                f"{where}: metric={self.metric} is none of {', '.join(METRICS)}; "
                "set recovery.metric=identity"
            )
        if self.clamp is not None and self.clamp < 0:
            raise ConfigError(
                f"{where}: clamp must be at least 0 or null, got {self.clamp:g}; "
                "set recovery.clamp=3"
            )
        if not 0 <= self.strength <= 1:
            raise ConfigError(
                f"{where}: strength must be in [0, 1], got {self.strength:g}; "
                "set recovery.strength=1"
            )

    @property
    def statistics(self) -> bool:
        """The covariance metric runs the original over the calibration samples once more."""
        return self.metric == "covariance"

    def recover(self, folder: Path, inputs: RecoveryInputs) -> dict[str, Any]:
        """Write the corrected adapter, and `layers.json`: what was done to each layer.

        Layer by layer on the device, for the covariance metric along a walk through the original:
        its moments go with their block. `host_bytes` is what hidden states may take of host memory.

        A layer's mismatch is the mean energy by which the original with the adapter misses the
        emulator with it, as the metric weighs inputs: those of the calibration tokens, or white
        ones of unit variance. `after` is what is predicted of the corrected adapter.
        """
        built_emulator, samples, device = inputs.built_emulator, inputs.samples, inputs.device
        adapter = read_lora(inputs.trained.folder / "adapter")
        run = None
        if samples is not None:
            run = iterate_checkpoint(
                built_emulator.source,
                samples.batches(built_emulator.source),
                list(by_block(adapter.pairs)),
                device,
                host_bytes=inputs.host_bytes,
                folder=folder,
            )
        corrected: dict[str, LoraPair] = {}
        done: dict[str, LayerCorrection] = {}
        known = _known(run, adapter.pairs, lambda layer: built_emulator.residual(layer, device))
        for one in tracked(known, "recover", len(adapter.pairs), "layer"):
            if one.gap is not None:
                pair = _on(adapter.pairs[one.layer], device)
                pair, change = self.correct(pair, one.gap, one.moments)
                corrected[one.layer] = _on(pair, CPU)
                done[one.layer] = LayerCorrection(change, _before(one))
        recovered = adapter.map(
            lambda layer, pair: corrected.get(layer, pair), {"by": "correction", **asdict(self)}
        )
        recovered.save(folder / "adapter")
        table = {layer: done[layer].facts for layer in adapter.pairs if layer in done}
        (folder / "layers.json").write_text(json.dumps(table, indent=1))
        facts = {"corrected_layers": len(done), **_summary(list(done.values()))}
        return facts | ({"samples": samples.ids} if samples is not None else {})

    def correct(
        self, pair: LoraPair, residual: Tensor, moments: ActivationMoments | None
    ) -> tuple[LoraPair, CorrectionEffect]:
        """Correct one layer's pair; `moments` only for the covariance metric."""
        if moments is None:
            return correct_identity(pair, residual, clamp=self.clamp, strength=self.strength)
        return correct_covariance(pair, residual, moments, clamp=self.clamp, strength=self.strength)


@dataclass(frozen=True)
class AdaptedLayer:
    """An adapted layer: the gap to close, and what calibration tokens say of it."""

    layer: str
    gap: Tensor | None  # original minus emulator weight (m, n); None: the same
    moments: ActivationMoments | None = None
    missed: float | None = None  # mean of ||gap x||^2 over the tokens


@dataclass(frozen=True)
class LayerCorrection:
    """What was done to a layer."""

    change: CorrectionEffect
    before: float  # mismatch of the adapter as it was trained

    @property
    def after(self) -> float:
        """Mismatch of the corrected one, which no rounding makes negative."""
        return max(0.0, self.before - self.change.removed)

    @property
    def facts(self) -> dict[str, Any]:
        """What is kept of it."""
        return asdict(self.change) | {"mismatch_before": self.before, "mismatch_after": self.after}


def _before(one: AdaptedLayer) -> float:
    assert one.gap is not None
    return float(one.gap.square().sum()) if one.missed is None else one.missed


def _known(
    run: Iterable[Block] | None,
    pairs: Mapping[str, LoraPair],
    gap_of: Callable[[str], Tensor | None],
) -> Iterator[AdaptedLayer]:
    """Every adapted layer, with what the metric needs of its activations."""
    if run is None:
        yield from (AdaptedLayer(layer, gap_of(layer)) for layer in pairs)
        return
    members = by_block(pairs)
    for block in run:
        layers = members[block.name]
        gaps = {layer: gap_of(layer) for layer in layers}
        found = _seen(block, {layer: pairs[layer] for layer in layers}, gaps)
        for layer in layers:
            if layer not in found:
                raise ConfigError(
                    f"recovery=correction: no calibration token reaches {layer}, so that its "
                    "inputs have no covariance; set recovery.metric=identity recovery.clamp=3"
                )
            yield AdaptedLayer(layer, gaps.pop(layer), *found.pop(layer))


def moments_along(
    run: Iterable[Block], pairs: Mapping[str, LoraPair]
) -> dict[str, ActivationMoments]:
    """What the covariance metric needs of each adapted layer, over the blocks of a walk.

    In host memory, as they are kept for all layers.
    """
    return {
        one.layer: replace(one.moments, aca=one.moments.aca.cpu(), ca=one.moments.ca.cpu())
        for one in _known(run, pairs, lambda _: None)
        if one.moments is not None
    }


def _seen(
    block: Block, pairs: Mapping[str, LoraPair], gaps: Mapping[str, Tensor | None]
) -> dict[str, tuple[ActivationMoments, float]]:
    """Run the block: layer -> moments and mean of ||gap x||^2, of the layers that take tokens."""
    linears = linears_of(block, pairs)
    a = {layer: pairs[layer].a.to(linear.weight.device) for layer, linear in linears.items()}
    # For the record alone, so that a product in the dtype of the model is exact enough.
    narrow = {
        layer: gap.to(linears[layer].weight.dtype) for layer, gap in gaps.items() if gap is not None
    }
    sums: dict[str, tuple[Tensor, Tensor, int]] = {}
    missed = dict.fromkeys(pairs, 0.0)

    def add(mask: Tensor | None) -> None:
        for layer, rows in taken.rows(mask).items():
            features = product(rows, a[layer].T)
            aca, ca, tokens = sums.get(layer, (None, None, 0))
            sums[layer] = (
                gram(features, total=aca),
                cross(rows, features, total=ca),
                tokens + len(rows),
            )
            if layer in narrow:
                gone = functional.linear(rows, narrow[layer])
                missed[layer] += float(gone.float().square().sum(dtype=torch.float64))

    with InputRecorder(linears) as taken:
        block.run(add)
    return {
        layer: (ActivationMoments(*one), missed[layer] / one[2])
        for layer, one in sums.items()
        if one[2]
    }


def _on(pair: LoraPair, device: torch.device) -> LoraPair:
    return replace(pair, a=pair.a.to(device), b=pair.b.to(device))


def _summary(done: Sequence[LayerCorrection]) -> dict[str, Any]:
    """Of all layers: the share of directions that the clamp shortened, and of mismatch left.

    The latter is the mean over layers, whose outputs are of different sizes.
    """
    directions = sum(one.change.directions for one in done)
    clamped = sum(one.change.clamped * one.change.directions for one in done)
    left = [one.after / one.before for one in done if one.before > 0]
    ratios = [one.change.ratio for one in done if one.change.ratio is not None]
    return {
        "clamped": round(clamped / directions, 4) if directions else 0.0,
        "ratio": round(statistics.median(ratios), 4) if ratios else None,
        "mismatch_left": round(statistics.mean(left), 6) if left else None,
    }
