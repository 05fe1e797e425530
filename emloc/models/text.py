"""Causal language models."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import AutoModelForCausalLM

from emloc.data.reader import ReaderSettings, TextReaderSettings
from emloc.models.generative import GenerativeModel


@dataclass(frozen=True, kw_only=True)
class TextModel(GenerativeModel):
    """Any `AutoModelForCausalLM` whose transformer blocks consist of `nn.Linear` layers."""

    auto = AutoModelForCausalLM

    @property
    def reader_settings(self) -> ReaderSettings:
        """Read prompts and answers as text, without images."""
        return TextReaderSettings()
