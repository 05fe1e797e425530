"""Models that read images and text and write text."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import AutoModelForImageTextToText

from emloc.models.checkpointed import Checkpointed


@dataclass(frozen=True, kw_only=True)
class VisionLanguageModel(Checkpointed):
    """Any `AutoModelForImageTextToText` whose blocks are made of `nn.Linear`."""

    auto = AutoModelForImageTextToText
