"""Polishing: improve an adapter on the original model itself, behind the recovery.

One file per method.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch

from emloc.adapters.training_inputs import TrainingInputs
from emloc.config.part import Part
from emloc.data.collate import EncodedRow
from emloc.models.checkpoint.source import Source
from emloc.runtime.stage_cache import Artifact, Facts
from emloc.stages.training.callbacks import Report


@dataclass(frozen=True, kw_only=True)
class PolishInputs:
    """The inputs of `Polish.polish`."""

    recovered: Artifact  # the adapter for the original model is in its folder `adapter`
    source: Source  # the original model
    training_inputs: TrainingInputs  # of the adapter's training
    next_rows: Callable[[int], Sequence[EncodedRow]]  # rows of so many steps behind the training's
    device: torch.device
    report: Report  # called with each line of the training log


class Polish(Part):
    """One method of improving an adapter on the original model."""

    section: ClassVar[str] = "polish"
    polishes: ClassVar[Literal[True]] = True

    keeps_weights: ClassVar[bool] = True  # whether all of the original stays on the device

    def check(self) -> None:
        """Check the launch, before any stage of the run begins.

        Raises:
            ConfigError: the method does not work so.
        """
        return

    @abstractmethod
    def polish(self, folder: Path, inputs: PolishInputs) -> Facts:
        """Write the improved adapter into `folder`/adapter.

        Returns:
            Facts about the work, among them `trained_rows` and `row_forwards` if it trains.
        """
