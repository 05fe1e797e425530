"""The inputs of a training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from emloc.adapters import Adapter
from emloc.config.settings import LoraSettings, TrainSettings
from emloc.data.examples import Examples


@dataclass(frozen=True)
class TrainingInputs:
    """Everything that a trained adapter depends on, except the emulator."""

    # The class was called this when the first cache keys were made.
    key_name: ClassVar[str] = "fit.Fit"

    adapter: Adapter
    lora: LoraSettings
    layers: tuple[str, ...]  # names of the original's linears that are adapted
    examples: Examples
    max_length: int | None
    recipe: TrainSettings
    seed: int
