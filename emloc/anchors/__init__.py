"""Anchored training: put the emulator back onto the original's hidden states while it is trained.

A LoRA on an emulator learns what the task asks for and what the emulator lacks. The original's
hidden states on the training rows are known from one pass without gradients, so the emulator's can
be put back onto them: h_p = e_p(h_{p-1}) + c_p behind some blocks, with constants c_p. While the
adapter is the one of the pass, the emulator then computes exactly the original with that adapter,
and the gradient is the chain rule through the emulator at the original's activations.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from transformers import PreTrainedModel

from emloc.anchors.formats import FORMATS, OffsetFormat
from emloc.anchors.places import Place
from emloc.config.part import Part
from emloc.config.values import OneOf, Range
from emloc.runtime.keys import class_name


@dataclass(frozen=True, kw_only=True)
class Anchor(Part):
    """Where the emulator is put back, how often the original is run, and how offsets are stored."""

    section: ClassVar[str] = "anchor"
    anchors: ClassVar[Literal[True]] = True

    # passes of the original; training goes on with the adapter in between
    rounds: Annotated[int, Range(least=1, usual=4)]
    # format of the offsets: bfloat16, int8 with scales, or float32
    dtype: Annotated[str, OneOf("bfloat16", "int8", "float32")]
    # training rows that only measure the original's loss; 0: rounds are never rejected
    guard: Annotated[int, Range(least=0, usual=64)]
    # fit low-rank factors anew at the start of each round, to what the loss depends on
    refit: bool = False
    # forget the optimizer's averages of gradients at the start of each round
    restart: bool = False

    @property
    def key(self) -> dict[str, Any]:
        """Cache key of a training with these anchors."""
        key = {
            **self.offsets_key, "rounds": self.rounds, "guard": self.guard, "refit": self.refit
        }  # fmt: skip
        return {**key, "restart": True} if self.restart else key

    @property
    def offsets_key(self) -> dict[str, Any]:
        """Cache key of the offsets themselves."""
        return {"part": class_name(type(self)), "dtype": self.dtype}

    @property
    def stored_as(self) -> OffsetFormat:
        """Format of the offsets."""
        return FORMATS[self.dtype]

    @abstractmethod
    def find(self, model: PreTrainedModel, decoder_blocks: Sequence[str]) -> list[Place]:
        """Return the places where the emulator is put back, in the order of computation.

        Args:
            model: the original; it may be on the meta device.
            decoder_blocks: names of the blocks that process tokens, in order.

        Raises:
            ConfigError: the model does not have them.
        """
