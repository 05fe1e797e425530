"""How a trained adapter is carried back to the original model: one file for each way."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from emloc.adapters.training_inputs import TrainingInputs
from emloc.calibration.samples import Samples
from emloc.config.part import Part
from emloc.emulators import BuiltEmulator
from emloc.runtime.stage_cache import Artifact


def silent(step: int, values: dict[str, float]) -> None:
    """A report that nobody reads."""


@dataclass(frozen=True, kw_only=True)
class RecoveryInputs:
    """What a recovery works on, and where."""

    trained: Artifact  # the adapter, in the folder `adapter` of its artifact
    built_emulator: BuiltEmulator  # the emulator it was trained through, and the original beneath
    samples: Samples | None  # of calibration, for a recovery with `statistics`
    training_inputs: (
        TrainingInputs | None
    )  # what the adapter was fitted to, for a recovery that `trains`
    device: torch.device
    host_bytes: int | None = None  # what hidden states may take of host memory
    report: Callable[[int, dict[str, float]], None] = silent  # takes each line of a training log


class Recovery(Part):
    """One way of carrying an adapter."""

    reads_pairs: ClassVar[bool] = True  # it works on A and B themselves
    scatters: ClassVar[bool] = False  # it enlarges what was trained on smaller layers
    trains: ClassVar[bool] = False  # it takes training steps, with all processes of a launch

    @property
    def statistics(self) -> bool:
        """Whether it runs the original model over the calibration samples."""
        return False

    @abstractmethod
    def recover(self, folder: Path, inputs: RecoveryInputs) -> dict[str, Any]:
        """Write the carried adapter into `folder`/adapter, modules trained whole included."""
