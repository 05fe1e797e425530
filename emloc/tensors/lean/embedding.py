"""A frozen token embedding that stays in host memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class HostEmbedding(nn.Module):
    """Looks up rows in host memory and copies only these to the device.

    The weight (V, d) is not registered as a parameter, so moving the model does not move it.

    Args:
        weight: the rows, on any device.
        device: of the vectors; None: that of the weight.
    """

    def __init__(self, weight: Tensor, device: torch.device | None = None) -> None:
        super().__init__()
        self.rows = weight.detach().cpu()
        self._device = weight.device if device is None else device

    @property
    def weight(self) -> Tensor:
        """The rows (V, d) in host memory, for models that read the embedding's device or dtype."""
        return self.rows

    def forward(self, input: Tensor) -> Tensor:
        """Map token ids (...,) to vectors (..., d) on the device."""
        return self.look_up(input.cpu()).to(self._device)

    def look_up(self, ids: Tensor) -> Tensor:
        """Map token ids (...,) in host memory to vectors (..., d) in host memory."""
        return functional.embedding(ids, self.rows)
