"""What a model is trained *through*: one file for each way of making it small."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from emloc.calibrate import Layers
from emloc.samples import Samples
from emloc.settings import Compression
from emloc.source import CPU, Source
from emloc.store import Artifact, key_of

# Layer name -> rank: the explicit table an emulator is built to.
Ranks = dict[str, int]


@dataclass(frozen=True)
class Given:
    """What an emulator is built from; None where it does not read it.

    Samples without statistics: they are taken while it is built, and not kept.
    """

    ranks: Ranks | None
    statistics: Artifact | None
    samples: Samples | None
    bits: int  # of a kept number: 16 as the model's dtype, 4 for nf4

    @property
    def key(self) -> list[Any]:
        """The same whether statistics were kept: they are of these samples, by these settings."""
        seen = self.statistics.key if self.samples is None and self.statistics else None
        return [key_of(self.ranks), key_of(self.samples), seen, self.bits]


class Emulator(Protocol):
    """One way of making a small stand-in for the original model."""

    def plan(self, source: Source, layers: Layers, budget: Compression) -> Ranks | None:
        """The rank of every layer it compresses; None if it knows no ranks.

        Raises:
            ConfigError: the budget cannot be met.
        """

    @property
    def statistics(self) -> str | None:
        """Second moments it is built from: `smaller` of input and output, `input`, or None."""

    def build(
        self,
        folder: Path,
        source: Source,
        given: Given,
        *,
        device: torch.device,
        host_bytes: int | None = None,
    ) -> dict[str, Any]:
        """Write what the original does not hold into `folder`.

        `host_bytes` is what hidden states may take of host memory, where samples are run again.
        """

    def open(self, folder: Path, source: Source, device: torch.device) -> PreTrainedModel:
        """The model to train through, frozen."""

    def residual(
        self, folder: Path, source: Source, layer: str, device: torch.device = CPU
    ) -> Tensor | None:
        """Original minus emulator weight (out, in) in float64; None where they are the same."""


@dataclass(frozen=True)
class Built:
    """An emulator as it stands: the way it was made, what was written, the original beneath."""

    emulator: Emulator
    artifact: Artifact
    source: Source

    @property
    def key(self) -> list[Any]:
        """What a stage that reads this emulator depends on."""
        return [key_of(self.emulator), self.artifact.key, self.source.key]

    def open(self, device: torch.device) -> PreTrainedModel:
        """The model to train through, frozen."""
        return self.emulator.open(self.artifact.folder, self.source, device)

    def residual(self, layer: str, device: torch.device = CPU) -> Tensor | None:
        """Original minus emulator weight (out, in) in float64; None where they are the same.

        It is formed on `device`.
        """
        return self.emulator.residual(self.artifact.folder, self.source, layer, device)
