"""Inputs of the training stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from emloc.adapters import Adapter
from emloc.config.settings import LoraSettings, TrainSettings
from emloc.data.examples import Examples


@dataclass(frozen=True)
class TrainingInputs:
    """Everything that the training of an adapter depends on, except the emulator."""

    # Former name of the class, which existing cache keys contain.
    key_name: ClassVar[str] = "fit.Fit"

    adapter: Adapter
    lora: LoraSettings
    layers: tuple[str, ...]  # names of the original model's linear layers to adapt
    examples: Examples
    max_length: int | None
    recipe: TrainSettings
    seed: int
