"""Causal language models."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import AutoModelForCausalLM

from emloc.data.reader import Reading, TextReading
from emloc.models.writer import Writer


@dataclass(frozen=True, kw_only=True)
class TextModel(Writer):
    """Any `AutoModelForCausalLM` whose blocks are made of `nn.Linear`."""

    auto = AutoModelForCausalLM

    @property
    def reading(self) -> Reading:
        """Text alone."""
        return TextReading()
