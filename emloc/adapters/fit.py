"""What an adapter is fitted to."""

from __future__ import annotations

from dataclasses import dataclass

from emloc.adapters import Adapter
from emloc.config.settings import LoraSettings, TrainSettings
from emloc.data.examples import Examples


@dataclass(frozen=True)
class Fit:
    """What is fitted to what: everything a trained adapter depends on but the emulator."""

    adapter: Adapter
    lora: LoraSettings
    layers: tuple[str, ...]  # names of the original's linears that are adapted
    examples: Examples
    max_length: int | None
    recipe: TrainSettings
    seed: int
