"""EMLoC's correction: make up for the gap between emulator and original (stage 3)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
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
from emloc.linalg.gram import cross, exact_float32, gram
from emloc.samples import Samples
from emloc.source import Source
from emloc.statistics import Taken
from emloc.store import Artifact
from emloc.walk import Block, by_block, open_walk

METRICS = ("identity", "covariance")


@dataclass(frozen=True, kw_only=True)
class Correction:
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
    ) -> dict[str, Any]:
        """Write the corrected adapter, and `layers.json`: what was done to each layer."""
        adapter = read_lora(trained.folder / "adapter")
        moments = _moments(adapter.pairs, built.source, samples, device)
        changes: dict[str, Change] = {}
        bar = tqdm(total=len(adapter.pairs), desc="recover", unit="layer")

        def change(layer: str, pair: Pair) -> Pair:
            bar.update()
            gap = built.residual(layer)
            if gap is None:
                return pair
            corrected, changes[layer] = self.correct(pair, gap, moments.get(layer))
            return corrected

        with bar:
            carried = adapter.map(change, {"by": "correction", **asdict(self)})
        carried.save(folder / "adapter")
        table = {layer: asdict(done) for layer, done in changes.items()}
        (folder / "layers.json").write_text(json.dumps(table, indent=1))
        return {"corrected_layers": len(changes), "clamped": _mean(changes)}

    def correct(self, pair: Pair, residual: Tensor, moments: Moments | None) -> tuple[Pair, Change]:
        """Correct one layer's pair; `moments` only for the covariance metric."""
        if moments is None:
            return correct_identity(pair, residual, clamp=self.clamp, strength=self.strength)
        return correct_covariance(pair, residual, moments, clamp=self.clamp, strength=self.strength)


def _moments(
    pairs: Mapping[str, Pair],
    source: Source,
    samples: Samples | None,
    device: torch.device,
) -> dict[str, Moments]:
    if samples is None:
        return {}
    blocks = list(by_block(pairs))
    run = open_walk(source, samples.batches(source), blocks, device)
    return moments_along(tqdm(run, "recover: activations", total=len(blocks), unit="block"), pairs)


def moments_along(run: Iterable[Block], pairs: Mapping[str, Pair]) -> dict[str, Moments]:
    """What the covariance metric needs of each adapted layer, over the blocks of a walk."""
    members = by_block(pairs)
    found: dict[str, Moments] = {}
    for block in run:
        found |= _moments_of(block, {layer: pairs[layer] for layer in members[block.name]})
    return found


def _moments_of(block: Block, pairs: Mapping[str, Pair]) -> dict[str, Moments]:
    found: dict[str, Moments] = {}

    def add(mask: Tensor | None) -> None:
        for layer, rows in taken.rows(mask).items():
            with exact_float32(rows.device):
                features = rows.float() @ pairs[layer].a.to(rows.device).float().T
            aca, ca = gram(features).cpu(), cross(rows, features).cpu()
            if layer in found:
                old = found[layer]
                found[layer] = Moments(old.aca + aca, old.ca + ca, old.tokens + len(rows))
            else:
                found[layer] = Moments(aca, ca, len(rows))

    with Taken(linears_of(block, pairs)) as taken:
        block.run(add)
    return found


def _mean(changes: Mapping[str, Change]) -> float:
    """Share of all directions that the clamp shortened."""
    directions = sum(change.directions for change in changes.values())
    clamped = sum(change.clamped * change.directions for change in changes.values())
    return round(clamped / directions, 4) if directions else 0.0
