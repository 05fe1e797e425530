"""Formats in which anchor offsets are stored: the numbers as they are, or int8 with scales.

Shapes: n tokens, d channels (the width of the hidden states).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor
from torch.nn import functional

# Name of a part -> tensor (n, ...), the stored form of some offsets.
Parts = Mapping[str, Tensor]

# Channels that share one scale in int8.
GROUP = 64
# Largest code of int8.
_LARGEST = 127


class OffsetFormat(ABC):
    """One format of stored offsets. All parts of one token are rows of the parts' tensors."""

    @abstractmethod
    def encode(self, offsets: Tensor) -> Parts:
        """Return the stored form of offsets (n, d)."""

    @abstractmethod
    def decode(self, parts: Parts, width: int) -> Tensor:
        """Return the offsets (..., d) of parts (..., *) in floating point."""

    @abstractmethod
    def token_bytes(self, width: int) -> int:
        """Return the bytes of the offset of one token at one place."""


@dataclass(frozen=True)
class Floats(OffsetFormat):
    """Offsets rounded to a floating-point dtype."""

    dtype: torch.dtype

    def encode(self, offsets: Tensor) -> Parts:
        """Round the offsets (n, d)."""
        return {"values": offsets.to(self.dtype)}

    def decode(self, parts: Parts, width: int) -> Tensor:
        """Return the rounded offsets (..., d)."""
        return parts["values"]

    def token_bytes(self, width: int) -> int:
        """Return the bytes of d numbers."""
        return width * self.dtype.itemsize


@dataclass(frozen=True)
class Int8(OffsetFormat):
    """Codes of 8 bits, with a scale in bfloat16 for each token and each 64 channels."""

    def encode(self, offsets: Tensor) -> Parts:
        """Return `codes` (n, d) int8 and `scales` (n, ceil(d / 64)) bfloat16."""
        grouped = _grouped(offsets.float())
        # Codes are computed with the scale as it is stored, so that rounding it costs nothing.
        scales = (grouped.abs().amax(-1) / _LARGEST).bfloat16()
        steps = scales.float().unsqueeze(-1)
        codes = (grouped / torch.where(steps > 0, steps, 1)).round().clamp(-_LARGEST, _LARGEST)
        return {"codes": codes.to(torch.int8).flatten(1)[:, : offsets.shape[1]], "scales": scales}

    def decode(self, parts: Parts, width: int) -> Tensor:
        """Return the offsets (..., d) in float32."""
        codes, scales = parts["codes"].float(), parts["scales"].float()
        return codes * scales.repeat_interleave(GROUP, -1)[..., :width]

    def token_bytes(self, width: int) -> int:
        """Return the bytes of d codes and of their scales."""
        return width + 2 * ceil(width / GROUP)


FORMATS: Mapping[str, OffsetFormat] = {
    "bfloat16": Floats(torch.bfloat16),
    "float32": Floats(torch.float32),
    "int8": Int8(),
}


def _grouped(offsets: Tensor) -> Tensor:
    """Return offsets (n, d) as (n, groups, 64), with zeros behind the last channel."""
    padded = functional.pad(offsets, (0, -offsets.shape[1] % GROUP))
    return padded.view(len(offsets), -1, GROUP)
