"""A frozen token embedding that stays in host memory."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class HostEmbedding(nn.Module):
    """Looks its rows up in host memory and sends only those to the device.

    The weight (V, d) is no parameter, so that moving the model leaves it where it is.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.rows = weight.detach().cpu()
        self._device = weight.device

    @property
    def weight(self) -> Tensor:
        """The rows, for models that ask where they are."""
        return self.rows

    def forward(self, input: Tensor) -> Tensor:
        """Ids (...,) to vectors (..., d) on the device the weight was on."""
        return functional.embedding(input.cpu(), self.rows).to(self._device)
