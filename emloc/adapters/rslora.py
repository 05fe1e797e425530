"""Rank-stabilised LoRA, by PEFT."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from emloc.adapters.lora import Lora


@dataclass(frozen=True, kw_only=True)
class RsLora(Lora):
    """`W x + (alpha / sqrt(rank)) B A x`: the scale that keeps its size as the rank grows."""

    variant = MappingProxyType({"use_rslora": True})
