"""What is trained: one file for each kind. PEFT is imported in this folder and nowhere else."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedModel

from emloc.settings import LoraSettings


class Adapter(Protocol):
    """One kind of adapter."""

    linear: bool = True  # what it adds to a weight is s B A and nothing else
    needs_weight: bool = False  # it reads the weight of the layer it is put on

    @property
    def trains(self) -> bool:
        """Whether there is anything to train."""

    def attach(self, model: PreTrainedModel, lora: LoraSettings, targets: str) -> Any:
        """A model whose only trainable parameters are the adapter's.

        `targets` is a regular expression on layer names.
        """

    def fuse(self, model: Any) -> bool:
        """Compute layer and adapter as one operation, if they can be; else change nothing."""

    def training(self, model: Any, mixed: bool) -> AbstractContextManager[None]:
        """What holds while the model trains, under autocast or not."""

    def save(self, model: Any, folder: Path, base: str) -> None:
        """Write the adapter as a PEFT folder for the original model, called `base`."""
