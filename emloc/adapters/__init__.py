"""What is trained: one file for each kind. PEFT is imported in this folder and nowhere else."""

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
    """One kind of adapter, from the model it is put on to the checkpoint it is merged into.

    A trait is None or a reason: the rest of a sentence that begins with "adapter=<name>". Refusals
    quote it.
    """

    trains: ClassVar[Literal[True]] = True
    # Why what it adds to a weight is not s B A and nothing else.
    nonlinear: ClassVar[str | None] = None
    # Why it reads the weight of the layer it is put on.
    needs_weight: ClassVar[str | None] = None

    @abstractmethod
    def attach(
        self,
        model: PreTrainedModel,
        lora: LoraSettings,
        layers: Sequence[str],
        whole: Sequence[str] = (),
    ) -> Any:
        """A model whose only trainable parameters are the adapter's.

        Args:
            model: frozen.
            lora: the size of the adapter.
            layers: full names of the linears that are adapted, each of which the model has.
            whole: names of modules whose own parameters are trained and saved with the adapter,
                such as a fresh head; linears inside them are not adapted.
        """

    @abstractmethod
    def load(self, model: PreTrainedModel, folder: Path, *, trainable: bool = False) -> Any:
        """The model with the adapter that `save` wrote into `folder`; frozen unless `trainable`."""

    @abstractmethod
    def save(self, model: Any, folder: Path, base: str) -> None:
        """Write the adapter for the original model, called `base`, into `folder`."""

    @abstractmethod
    def merge(self, source: Source, folder: Path, target: Path) -> Path:
        """Write a checkpoint of `source` that computes what the saved adapter in `folder` does.

        Returns:
            `target`.

        Raises:
            ConfigError: no change of the weights does so, or the files do not go together.
        """

    def base(self, model: Any) -> PreTrainedModel:
        """The transformers model that `attach` or `load` put the adapter on."""
        inner: PreTrainedModel = model
        return inner

    def state(self, model: Any) -> dict[str, Tensor]:
        """What a checkpoint of the training holds: all that is trained and nothing frozen."""
        return {name: one.detach() for name, one in model.named_parameters() if one.requires_grad}

    @torch.no_grad()
    def restore(self, model: Any, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave.

        Raises:
            ValueError: it is the state of another adapter or model.
        """
        own = self.state(model)
        if other := sorted(own.keys() ^ state.keys()):
            raise ValueError(f"the checkpoint and the model differ in {other[0]}")
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def auxiliary_loss(self, model: Any) -> Tensor | None:
        """What the last forward pass adds to the loss, a scalar; None for nothing.

        It is read once behind each forward pass of the training, before the backward pass, and is
        a mean over the rows of that pass. The trainer divides it by the passes of a step.
        `AuxiliaryLosses` collects it from layers.
        """
        return None

    def fuse(self, model: Any) -> bool:
        """Compute layer and adapter as one operation, if they can be; else change nothing."""
        return False

    def training(self, model: Any, mixed: bool) -> AbstractContextManager[None]:
        """What holds while the model trains, under autocast (`mixed`) or not."""
        return nullcontext()
