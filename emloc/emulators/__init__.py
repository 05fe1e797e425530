"""What a model is trained *through*: one file for each way of making it small."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from emloc.calibrate import Layers
from emloc.samples import Samples
from emloc.settings import Compression
from emloc.source import Source
from emloc.store import Artifact

# Layer name -> rank: the explicit table an emulator is built to.
Ranks = dict[str, int]


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
        ranks: Ranks | None,
        statistics: Artifact | None,
        samples: Samples | None,
        *,
        device: torch.device,
    ) -> dict[str, Any]:
        """Write what the original does not hold into `folder`."""

    def open(self, folder: Path, source: Source, device: torch.device) -> PreTrainedModel:
        """The model to train through, frozen."""

    def residual(self, folder: Path, source: Source, layer: str) -> Tensor | None:
        """Original minus emulator weight (out, in) in float64; None where they are the same."""
