"""No adapter: the model as it is."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from emloc.adapters import Adapter
from emloc.settings import LoraSettings


@dataclass(frozen=True, kw_only=True)
class NoAdapter(Adapter):
    """Nothing to train."""

    trains = False

    def attach(self, model: PreTrainedModel, lora: LoraSettings, targets: str) -> PreTrainedModel:
        """The model itself."""
        return model

    def fuse(self, model: PreTrainedModel) -> bool:
        """There is nothing to compute."""
        return False

    def training(self, model: PreTrainedModel, mixed: bool) -> AbstractContextManager[None]:
        """There is no training."""
        return nullcontext()

    def save(self, model: PreTrainedModel, folder: Path, base: str) -> None:
        """There is nothing to write."""
