"""EMLoC's correction: make up for the gap between emulator and original (stage 3)."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from emloc.adapters.saved import read_lora
from emloc.calibrate import linears_of
from emloc.emulators import Built
from emloc.errors import ConfigError
from emloc.linalg.correct import Change, Moments, Pair, correct_covariance, correct_identity
from emloc.linalg.gram import cross, gram, product
from emloc.recovery import Recovery
from emloc.samples import Samples
from emloc.source import CPU
from emloc.statistics import Taken
from emloc.store import Artifact
from emloc.walk import Block, by_block, open_walk

log = logging.getLogger(__name__)

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

    def carry(
        self,
        folder: Path,
        trained: Artifact,
        built: Built,
        samples: Samples | None,
        *,
        device: torch.device,
        host_bytes: int | None = None,
    ) -> dict[str, Any]:
        """Write the corrected adapter, and `layers.json`: what was done to each layer.

        Layer by layer on the device, for the covariance metric along a walk through the original:
        its moments go with their block. `host_bytes` is what hidden states may take of host memory.
        """
        adapter = read_lora(trained.folder / "adapter")
        run = None
        if samples is not None:
            run = open_walk(
                built.source,
                samples.batches(built.source),
                list(by_block(adapter.pairs)),
                device,
                host_bytes=host_bytes,
                folder=folder,
            )
        corrected: dict[str, Pair] = {}
        changes: dict[str, Change] = {}
        known = _known(run, adapter.pairs)
        for layer, moments in tqdm(known, "recover", total=len(adapter.pairs), unit="layer"):
            gap = built.residual(layer, device)
            if gap is not None:
                pair = _on(adapter.pairs[layer], device)
                pair, changes[layer] = self.correct(pair, gap, moments)
                corrected[layer] = _on(pair, CPU)
        carried = adapter.map(
            lambda layer, pair: corrected.get(layer, pair), {"by": "correction", **asdict(self)}
        )
        carried.save(folder / "adapter")
        table = {layer: asdict(changes[layer]) for layer in adapter.pairs if layer in changes}
        (folder / "layers.json").write_text(json.dumps(table, indent=1))
        return {"corrected_layers": len(changes), "clamped": _mean(changes)}

    def correct(self, pair: Pair, residual: Tensor, moments: Moments | None) -> tuple[Pair, Change]:
        """Correct one layer's pair; `moments` only for the covariance metric."""
        if moments is None:
            return correct_identity(pair, residual, clamp=self.clamp, strength=self.strength)
        return correct_covariance(pair, residual, moments, clamp=self.clamp, strength=self.strength)


def _known(
    run: Iterable[Block] | None, pairs: Mapping[str, Pair]
) -> Iterator[tuple[str, Moments | None]]:
    """Every adapted layer, with what the metric needs of its activations."""
    if run is None:
        yield from ((layer, None) for layer in pairs)
        return
    members = by_block(pairs)
    for block in run:
        found = _moments_of(block, {layer: pairs[layer] for layer in members[block.name]})
        for layer in members[block.name]:
            if layer not in found:
                log.warning("%s: no calibration token reached it; corrected by identity", layer)
            yield layer, found.pop(layer, None)


def moments_along(run: Iterable[Block], pairs: Mapping[str, Pair]) -> dict[str, Moments]:
    """What the covariance metric needs of each adapted layer, over the blocks of a walk.

    In host memory, as they are kept for all layers.
    """
    return {
        layer: replace(moments, aca=moments.aca.cpu(), ca=moments.ca.cpu())
        for layer, moments in _known(run, pairs)
        if moments is not None
    }


def _moments_of(block: Block, pairs: Mapping[str, Pair]) -> dict[str, Moments]:
    linears = linears_of(block, pairs)
    a = {layer: pairs[layer].a.to(linear.weight.device) for layer, linear in linears.items()}
    sums: dict[str, tuple[Tensor, Tensor, int]] = {}

    def add(mask: Tensor | None) -> None:
        for layer, rows in taken.rows(mask).items():
            features = product(rows, a[layer].T)
            aca, ca, tokens = sums.get(layer, (None, None, 0))
            sums[layer] = (
                gram(features, total=aca),
                cross(rows, features, total=ca),
                tokens + len(rows),
            )

    with Taken(linears) as taken:
        block.run(add)
    return {layer: Moments(*one) for layer, one in sums.items() if one[2]}


def _on(pair: Pair, device: torch.device) -> Pair:
    return replace(pair, a=pair.a.to(device), b=pair.b.to(device))


def _mean(changes: Mapping[str, Change]) -> float:
    """Share of all directions that the clamp shortened."""
    directions = sum(change.directions for change in changes.values())
    clamped = sum(change.clamped * change.directions for change in changes.values())
    return round(clamped / directions, 4) if directions else 0.0
