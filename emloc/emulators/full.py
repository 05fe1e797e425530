"""The original model itself: LoRA as everybody knows it, and the upper bound."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from emloc.calibrate import Layers
from emloc.emulators import Given
from emloc.emulators.size import size_facts
from emloc.settings import Compression
from emloc.source import Source


@dataclass(frozen=True, kw_only=True)
class Full:
    """No compression. The artifact is a reference: no weight is copied."""

    statistics = None

    def plan(self, source: Source, layers: Layers, budget: Compression) -> None:
        """No budget applies."""
        return None

    def build(
        self, folder: Path, source: Source, given: Given, *, device: torch.device
    ) -> dict[str, Any]:
        """Nothing to write; the size of the model for the record."""
        return size_facts(source, {})

    def open(self, folder: Path, source: Source, device: torch.device) -> PreTrainedModel:
        """The original model, frozen."""
        return source.load(device)

    def residual(self, folder: Path, source: Source, layer: str) -> None:
        """No layer differs from the original."""
        return None
