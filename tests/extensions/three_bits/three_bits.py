"""A packed format of three bits: seven even steps from minus to plus the largest of each group."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from emloc.errors import ConfigError
from emloc.precision import Layout, Packed, Precision

BITS, STEPS = 3, 3  # a code less STEPS is a step: -3 to 3


@dataclass(frozen=True, kw_only=True)
class ThreeBits(Precision):
    """A matrix in row-major order is `codes`, eight in three bytes, and `scales`, one a group."""

    group: int  # numbers that share a scale; a multiple of eight

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits != BITS:
            raise ConfigError(f"precision.bits={self.bits}: set precision.bits={BITS}")
        if self.group < 8 or self.group % 8:
            raise ConfigError(
                f"precision.group must be a multiple of 8, got {self.group}; set precision.group=64"
            )

    def layout(self, rows: int, columns: int) -> Layout:
        """Whole groups; scales in 16 bits."""
        groups = -(-rows * columns // self.group)
        return {
            "codes": ((groups, self.group * BITS // 8), torch.uint8),
            "scales": ((groups,), torch.float16),
        }

    def pack(self, matrix: Tensor) -> dict[str, Tensor]:
        """The nearest steps."""
        flat = matrix.reshape(-1).float()
        flat = functional.pad(flat, (0, -flat.numel() % self.group)).view(-1, self.group)
        scales = (flat.abs().amax(1) / STEPS).half()
        # A group of zeros has a scale of zero, which nothing is divided by.
        steps = flat / scales.float().clamp_min(torch.finfo(torch.float16).tiny)[:, None]
        codes = steps.round().clamp(-STEPS, STEPS).long() + STEPS
        words = (codes.view(len(flat), -1, 8) << _shifts(flat.device)).sum(-1)
        data = torch.stack([words >> 16, words >> 8, words], -1) & 255
        return {"codes": data.to(torch.uint8).flatten(1), "scales": scales}

    def unpack(self, packed: Packed, out: Tensor | None) -> Tensor:
        """Steps times scales; `out` is left to who asked."""
        codes, scales = packed.parts["codes"], packed.parts["scales"]
        data = codes.view(len(codes), -1, 3).long()
        words = (data[..., 0] << 16) | (data[..., 1] << 8) | data[..., 2]
        steps = ((words[..., None] >> _shifts(codes.device)) & 7).flatten(1) - STEPS
        rows, columns = packed.shape
        flat = (steps * scales.float()[:, None]).flatten()[: rows * columns]
        return flat.view(rows, columns).to(packed.dtype)


def _shifts(device: torch.device) -> Tensor:
    """Where each of eight codes begins in a word of 24 bits."""
    return torch.arange(21, -1, -3, device=device)
