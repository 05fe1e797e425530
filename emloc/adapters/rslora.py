"""Rank-stabilised LoRA, as implemented by PEFT."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from emloc.adapters.lora import Lora


@dataclass(frozen=True, kw_only=True)
class RsLora(Lora):
    """rsLoRA: `W x + (alpha / sqrt(rank)) B A x`, whose update keeps its size as the rank grows."""

    variant = MappingProxyType({"use_rslora": True})
