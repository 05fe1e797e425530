"""Auxiliary losses that adapted layers compute in their forward pass."""

from __future__ import annotations

from torch import Tensor, nn


class AuxiliaryLosses:
    """Collects the auxiliary losses of a model's layers during each forward pass, once per layer.

    With activation checkpointing, the backward pass calls a layer a second time. By then `take`
    has stopped the collection until the next forward pass of the model, so the second loss is
    ignored; the first keeps its graph. Losses that nobody takes are dropped by the next forward
    pass.
    """

    def __init__(self, model: nn.Module) -> None:
        self._losses: list[Tensor] | None = None
        model.register_forward_pre_hook(lambda *_: self._start())

    def _start(self) -> None:
        self._losses = []

    def add(self, loss: Tensor) -> None:
        """Add one layer's loss, a scalar; ignored outside a forward pass of the model."""
        if self._losses is not None:
            self._losses.append(loss)

    def take(self) -> Tensor | None:
        """Return the mean of the collected losses and stop collecting; None if there are none."""
        losses, self._losses = self._losses, None
        return sum(losses[1:], losses[0]) / len(losses) if losses else None
