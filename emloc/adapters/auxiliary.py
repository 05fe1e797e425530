"""Terms of the loss that adapted layers compute for themselves in a forward pass."""

from __future__ import annotations

from torch import Tensor, nn


class AuxiliaryLosses:
    """Collects one forward pass's terms, each layer's once.

    A layer whose activations are computed again is called a second time in the backward pass. That
    is behind `take`, which ends the collecting until the model is called again; the terms of the
    first call keep their graph. Of a forward pass that nobody takes from, the next one drops them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._terms: list[Tensor] | None = None
        model.register_forward_pre_hook(lambda *_: self._begin())

    def _begin(self) -> None:
        self._terms = []

    def add(self, term: Tensor) -> None:
        """Count a scalar in, where terms are being collected."""
        if self._terms is not None:
            self._terms.append(term)

    def take(self) -> Tensor | None:
        """The mean of the terms; None where there are none. A second call gives None."""
        terms, self._terms = self._terms, None
        return sum(terms[1:], terms[0]) / len(terms) if terms else None
