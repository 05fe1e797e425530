"""Causal language models."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import AutoModelForCausalLM

from emloc.data.reader import ReaderSettings, TextReaderSettings
from emloc.models.generative import GenerativeModel


@dataclass(frozen=True, kw_only=True)
class TextModel(GenerativeModel):
    """Any `AutoModelForCausalLM` whose blocks are made of `nn.Linear`."""

    auto = AutoModelForCausalLM

    @property
    def reader_settings(self) -> ReaderSettings:
        """Text alone."""
        return TextReaderSettings()
