"""Adapters, the trainable parameters of a run: one file per kind. Only this folder imports PEFT."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from emloc.config.part import Part
from emloc.config.settings import LoraSettings
from emloc.models.checkpoint.source import Source


class Adapter(Part):
    """One kind of adapter: how it is attached to a model, saved, loaded and merged.

    The traits `nonlinear` and `needs_weight` are None, or the reason why the adapter has the
    trait. Error messages quote the reason behind "adapter=<name>".
    """

    section: ClassVar[str] = "adapter"

    trains: ClassVar[Literal[True]] = True
    # Why the adapter changes a weight by anything else than s B A.
    nonlinear: ClassVar[str | None] = None
    # Why the adapter has to read the weight of the layer under it.
    needs_weight: ClassVar[str | None] = None
    # Whether a new adapter changes no output, on the emulator or on the original.
    starts_at_zero: ClassVar[bool] = True

    @abstractmethod
    def attach(
        self,
        model: PreTrainedModel,
        lora: LoraSettings,
        layers: Sequence[str],
        modules_to_save: Sequence[str] = (),
    ) -> Any:
        """Return the model with a new adapter, whose parameters are the only trainable ones.

        Args:
            model: frozen.
            lora: rank, alpha and dropout of the adapter.
            layers: full names of the linear layers to adapt; the model has all of them.
            modules_to_save: names of modules that are trained in full and saved with the adapter,
                such as a new classifier head; linear layers inside them are not adapted.
        """

    @abstractmethod
    def load(self, model: PreTrainedModel, folder: Path, *, trainable: bool = False) -> Any:
        """Return the model with the adapter saved in `folder`, frozen unless `trainable`."""

    @abstractmethod
    def save(self, model: Any, folder: Path, base: str) -> None:
        """Write the adapter into `folder`; `base` is the name of the original model it is for."""

    @abstractmethod
    def merge(
        self, source: Source, folder: Path, target: Path, dtype: torch.dtype | None = None
    ) -> Path:
        """Merge the adapter saved in `folder` into the weights of `source`; write a checkpoint.

        `dtype` is that of the weights that are written; None: as the source's files store them.

        Returns:
            `target`, the checkpoint's folder.

        Raises:
            ConfigError: the adapter cannot be expressed as weights, or it is for another model.
        """

    def base(self, model: Any) -> PreTrainedModel:
        """Return the transformers model inside `model`, as it was passed to `attach` or `load`."""
        inner: PreTrainedModel = model
        return inner

    def state(self, model: Any) -> dict[str, Tensor]:
        """Trainable parameters by name: the part of the model that a training checkpoint holds."""
        return {
            name: parameter.detach()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }

    @torch.no_grad()
    def restore(self, model: Any, state: Mapping[str, Tensor]) -> None:
        """Copy the parameters in `state`, as returned by `Adapter.state`, into the model.

        Raises:
            ValueError: the names differ, so that the state is of another adapter or model.
        """
        current = self.state(model)
        if other := sorted(current.keys() ^ state.keys()):
            raise ValueError(f"the checkpoint and the model differ in {other[0]}")
        for name, tensor in current.items():
            tensor.copy_(state[name])

    def auxiliary_loss(self, model: Any) -> Tensor | None:
        """Return the auxiliary loss of the last forward pass, a scalar; None if there is none.

        The trainer reads it once after each forward pass in training, before the backward pass.
        It is a mean over the rows of that pass; the trainer divides it by the number of forward
        passes in a step. `AuxiliaryLosses` helps to collect it from layers.
        """
        return None

    def fuse(self, model: Any) -> bool:
        """Fuse each adapted layer with its adapter into one operation; return whether it did."""
        return False

    def training(self, model: Any, mixed: bool) -> AbstractContextManager[None]:
        """Return the context that the model is trained in; `mixed` says whether autocast is on."""
        return nullcontext()
