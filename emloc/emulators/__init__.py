"""What a model is trained *through*: one file for each way of making it small."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from emloc.calibration.calibrate import Layers
from emloc.calibration.samples import Samples
from emloc.config.part import Part
from emloc.config.settings import Compression
from emloc.models.checkpoint.source import CPU, Source
from emloc.models.family import ModelFamily
from emloc.precision import Precision, bits_of
from emloc.runtime.keys import key_of
from emloc.runtime.stage_cache import Artifact

# Layer name -> rank: the explicit table a factorised emulator is built to.
Ranks = dict[str, int]

# What an emulator is built to, as plain values: ranks, blocks left out, parameters to keep.
Plan = dict[str, Any]


@dataclass(frozen=True)
class BuildInputs:
    """What an emulator is built from; None where it does not read it.

    Samples without statistics: they are taken while it is built, and not kept.
    """

    plan: Plan | None
    statistics: Artifact | None
    samples: Samples | None
    precision: Precision | None  # of a kept number; None: the model's dtype

    @property
    def key(self) -> list[Any]:
        """The same whether statistics were kept: they are of these samples, by these settings."""
        seen = self.statistics.key if self.samples is None and self.statistics else None
        held = self.bits if self.precision is None else self.precision.key
        return [key_of(self.plan), key_of(self.samples), seen, held]

    @property
    def bits(self) -> int:
        """Of a kept number, for the record."""
        return bits_of(self.precision)


class Emulator(Part):
    """One way of making a small stand-in for the original model.

    A class says so where it differs from the values and methods that are given here.
    """

    # An adapted layer has one weight (out, in), there at any time.
    keeps_weights: ClassVar[bool] = True
    # Adapted layers take and give what they do in the original.
    same_shapes: ClassVar[bool] = True
    # Its weights are gone in the backward pass, unless they are computed again.
    recomputes: ClassVar[bool] = False

    @property
    def samples(self) -> bool:
        """Whether it is built from calibration samples."""
        return False

    @property
    def statistics(self) -> str | None:
        """Second moments it wants of them: `smaller` of input and output, `input`, or None."""
        return None

    def model(self, original: ModelFamily, budget: Compression) -> ModelFamily:
        """The model that is trained, carried to and scored: the original, but for a sibling.

        Raises:
            ConfigError: there is none for this budget.
        """
        return original

    def targets(self, folder: Path, layers: Sequence[str]) -> list[str]:
        """Of the layers that are adapted in the original, those that are here."""
        return list(layers)

    @abstractmethod
    def plan(self, source: Source, layers: Layers, budget: Compression) -> Plan | None:
        """What it is built to; None if there is nothing to decide.

        Args:
            source: the original.
            layers: those that may be compressed, name -> (out, in).
            budget: what may be kept of them.

        Raises:
            ConfigError: the budget cannot be met.
        """

    @abstractmethod
    def build(
        self,
        folder: Path,
        source: Source,
        build_inputs: BuildInputs,
        *,
        device: torch.device,
        host_bytes: int | None = None,
    ) -> dict[str, Any]:
        """Write what the original does not hold into `folder`.

        `host_bytes` is what hidden states may take of host memory, where samples are run again.
        """

    @abstractmethod
    def open(
        self,
        folder: Path,
        source: Source,
        device: torch.device,
        *,
        precision: Precision | None = None,
    ) -> PreTrainedModel:
        """The model to train through, frozen; `precision` is the one it was built with.

        Raises:
            ValueError: it was built with one, and none is given.
        """

    @abstractmethod
    def residual(
        self,
        folder: Path,
        source: Source,
        layer: str,
        device: torch.device = CPU,
        *,
        precision: Precision | None = None,
    ) -> Tensor | None:
        """Original minus emulator weight (out, in) in float64; None where they are the same."""


@dataclass(frozen=True)
class BuiltEmulator:
    """An emulator as it stands: the way it was made, what was written, the original beneath."""

    emulator: Emulator
    artifact: Artifact
    source: Source
    precision: Precision | None = None  # as it was built

    def targets(self, layers: Sequence[str]) -> list[str]:
        """Of the layers that are adapted in the original, those that are in the emulator."""
        return self.emulator.targets(self.artifact.folder, layers)

    @property
    def key(self) -> list[Any]:
        """What a stage that reads this emulator depends on."""
        return [key_of(self.emulator), self.artifact.key, self.source.key]

    def open(self, device: torch.device) -> PreTrainedModel:
        """The model to train through, frozen."""
        folder = self.artifact.folder
        return self.emulator.open(folder, self.source, device, precision=self.precision)

    def residual(self, layer: str, device: torch.device = CPU) -> Tensor | None:
        """Original minus emulator weight (out, in) in float64; None where they are the same.

        It is formed on `device`.
        """
        folder = self.artifact.folder
        return self.emulator.residual(folder, self.source, layer, device, precision=self.precision)
