"""Emulators: small stand-ins for the original model, on which adapters are trained."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from emloc.calibration.calibrate import Layers
from emloc.calibration.offload import UNLIMITED, StateLimits
from emloc.calibration.samples import Samples
from emloc.config.part import Part
from emloc.config.settings import Compression
from emloc.models.checkpoint.source import CPU, Source
from emloc.models.family import ModelFamily
from emloc.precision import Precision, bits_of, has_feedback
from emloc.runtime.keys import key_of
from emloc.runtime.stage_cache import Artifact

# Layer name -> rank of its factors in a factorised emulator.
Ranks = dict[str, int]

# A build plan in plain values, which enters the cache key: ranks, dropped blocks, or the number of
# parameters to keep.
Plan = dict[str, Any]


@dataclass(frozen=True)
class BuildInputs:
    """The inputs of `Emulator.build`; an input is None if the emulator does not read it.

    Given samples but no statistics, the build computes the statistics block by block and discards
    them.
    """

    plan: Plan | None
    statistics: Artifact | None
    samples: Samples | None
    precision: Precision | None  # packed format of the kept weights; None: the model's dtype

    @property
    def key(self) -> list[Any]:
        """Cache key of the inputs; statistics are in it only if there are no samples.

        Samples and settings determine the statistics, so it does not matter whether these were
        cached.
        """
        statistics = self.statistics.key if self.samples is None and self.statistics else None
        precision = self.bits if self.precision is None else self.precision.key
        return [key_of(self.plan), key_of(self.samples), statistics, precision]

    @property
    def bits(self) -> int:
        """Bits of each kept weight, without the scales of a packed format."""
        return bits_of(self.precision)

    @property
    def sample_facts(self) -> dict[str, Any]:
        """Facts of a build about the samples that it read: their ids."""
        return {"samples": self.samples.ids} if self.samples else {}


class Emulator(Part):
    """One method of building a small stand-in for the original model.

    The defaults below describe an emulator that keeps every layer; a subclass overrides whatever
    differs.
    """

    section: ClassVar[str] = "emulator"

    # Whether each adapted layer always has its weight (out, in) in memory.
    keeps_weights: ClassVar[bool] = True
    # Whether adapted layers have the same input and output widths as in the original.
    same_shapes: ClassVar[bool] = True
    # Whether training must recompute activations, because a block's weights leave the device after
    # its forward pass.
    recomputes: ClassVar[bool] = False
    # Why it cannot be put back onto the original's hidden states; None: it keeps the blocks in
    # order, so it can.
    unanchored: ClassVar[str | None] = None

    # Whether it can be opened without the vision tower (train.features=stored).
    leaves_out_tower: ClassVar[bool] = False

    @property
    def samples(self) -> bool:
        """Whether the build reads calibration samples."""
        return False

    @property
    def statistics(self) -> str | None:
        """Grams that the build reads: `input`, `smaller` (of input and output), or None."""
        return None

    def reads_samples(self, precision: Precision | None) -> bool:
        """Whether a build in this format reads calibration samples.

        A format with error feedback needs them to know what the weights are multiplied by.
        """
        return self.samples or has_feedback(precision)

    def statistics_in(self, precision: Precision | None) -> str | None:
        """Grams that a build in this format reads, as `statistics`: input Grams for feedback."""
        kind = self.statistics
        return "input" if kind and has_feedback(precision) else kind

    def joint(self, source: Source, layers: Collection[str]) -> set[str]:
        """Return those of `layers` that need an input Gram, whichever Gram is the smaller."""
        return set()

    def model(self, original: ModelFamily, budget: Compression) -> ModelFamily:
        """Return the model that is trained, recovered for and scored: usually the original.

        Raises:
            ConfigError: there is no such model for this budget.
        """
        return original

    def targets(self, folder: Path, layers: Sequence[str]) -> list[str]:
        """Those of the original's adapted `layers` that the emulator in `folder` also adapts."""
        return list(layers)

    @abstractmethod
    def plan(self, source: Source, layers: Layers, budget: Compression) -> Plan | None:
        """Return the build plan that meets the budget; None if there is nothing to plan.

        Args:
            source: the original model.
            layers: the layers that may be compressed, name -> (out, in).
            budget: share of the parameters to keep, and the bits of each.

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
        limits: StateLimits = UNLIMITED,
    ) -> dict[str, Any]:
        """Write the emulator's files into `folder`; weights of the original are not copied.

        Args:
            folder: of the emulator's artifact.
            source: the original model.
            build_inputs: plan, statistics, samples and format.
            device: where the build computes.
            limits: memory for hidden states, if samples are run.

        Returns:
            Facts about the emulator, such as its size, which the run keeps with its results.
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
        """Load the emulator from `folder` as a frozen model on `device`.

        Args:
            folder: of the emulator's artifact.
            source: the original model.
            device: where the model is loaded.
            precision: packed format that the emulator was built in.

        Raises:
            ValueError: the emulator was built in a packed format, and `precision` is None.
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
        """Original minus emulator weight (out, in) in float64; None if both are equal."""


@dataclass(frozen=True)
class BuiltEmulator:
    """A finished emulator: its method and settings, its files, and the original model."""

    emulator: Emulator
    artifact: Artifact
    source: Source
    precision: Precision | None = None  # packed format of the files; None: the model's dtype

    def targets(self, layers: Sequence[str]) -> list[str]:
        """Those of the original's adapted `layers` that the emulator also adapts."""
        return self.emulator.targets(self.artifact.folder, layers)

    @property
    def key(self) -> list[Any]:
        """Cache key of the emulator, for the stages that read it."""
        return [key_of(self.emulator), self.artifact.key, self.source.key]

    def open(self, device: torch.device) -> PreTrainedModel:
        """Load the emulator as a frozen model on `device`."""
        folder = self.artifact.folder
        return self.emulator.open(folder, self.source, device, precision=self.precision)

    def residual(self, layer: str, device: torch.device = CPU) -> Tensor | None:
        """Original minus emulator weight (out, in) in float64; None if both are equal.

        The difference is computed on `device`.
        """
        folder = self.artifact.folder
        return self.emulator.residual(folder, self.source, layer, device, precision=self.precision)
