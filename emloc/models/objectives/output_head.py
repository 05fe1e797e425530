"""A stand-in for a model's output head, so that the model does not compute all of its logits."""

from __future__ import annotations

from torch import Tensor, nn


class IdentityHead(nn.Module):
    """Replacement of a model's output head that returns the hidden states unchanged.

    While `logits` (V,) or (..., V) is set, the module returns these logits instead. The output of
    the model then shows what else the model does to its logits.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight  # some models read the dtype of the head's weight
        self.logits: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """Return `hidden` (..., d), or the logits expanded to (..., V)."""
        if self.logits is None:
            return hidden
        return self.logits.expand(*hidden.shape[:-1], -1)


def name_of_head(model: nn.Module, head: nn.Module) -> str:
    """Name of the module `head` in `model`."""
    return next(name for name, module in model.named_modules() if module is head)
