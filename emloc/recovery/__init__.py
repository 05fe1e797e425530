"""Recoveries: they adapt a trained adapter to the original model. One file per method."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from emloc.adapters.training_inputs import TrainingInputs
from emloc.calibration.offload import UNLIMITED, StateLimits
from emloc.calibration.samples import Samples
from emloc.config.part import Part
from emloc.emulators import BuiltEmulator
from emloc.runtime.stage_cache import Artifact


def ignore_log(step: int, values: dict[str, float]) -> None:
    """Ignore a line of the training log: the default of `RecoveryInputs.report`."""


@dataclass(frozen=True, kw_only=True)
class RecoveryInputs:
    """The inputs of `Recovery.recover`: adapter, emulator, original model, samples and device."""

    trained: Artifact  # of the training stage; the adapter is in its folder `adapter`
    built_emulator: BuiltEmulator  # the adapter was trained on it; it knows the original model
    samples: Samples | None  # calibration samples, if `Recovery.statistics` is true
    training_inputs: TrainingInputs | None  # of the adapter's training, if `Recovery.trains`
    device: torch.device
    limits: StateLimits = UNLIMITED  # limit of host memory for hidden states; None: no limit
    report: Callable[[int, dict[str, float]], None] = ignore_log  # called with (step, log values)


class Recovery(Part):
    """One method of adapting a trained adapter to the original model."""

    section: ClassVar[str] = "recovery"

    reads_pairs: ClassVar[bool] = True  # whether it reads the LoRA matrices A and B
    scatters: ClassVar[bool] = False  # whether it enlarges an adapter of pruned layers
    subtracts: ClassVar[bool] = False  # whether it takes the emulator's error off the adapter
    trains: ClassVar[bool] = False  # whether it runs training steps, on all processes of a launch

    @property
    def statistics(self) -> bool:
        """Whether the recovery runs the original model over the calibration samples."""
        return False

    @abstractmethod
    def recover(self, folder: Path, inputs: RecoveryInputs) -> dict[str, Any]:
        """Write the recovered adapter, with modules trained in full, into `folder`/adapter.

        Returns:
            Facts about the recovery, which the run keeps with its results.
        """
