"""Leave the padding of a batch out of the tokens that a layer reads, whatever their shape is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from emloc.errors import ConfigError

# Arguments of a decoder's block with tokens of another sequence, such as features of an image.
OTHER_SEQUENCES = ("cross_attention_states", "encoder_hidden_states", "image_hidden_states")


@dataclass(frozen=True)
class TokenMask:
    """The positions of one batch that hold real tokens.

    `is_real` (batch, length) is false for padding. `others` are tensors of other sequences that the
    block reads beside the tokens of the batch; the mask does not describe them.
    """

    is_real: Tensor
    others: tuple[Tensor, ...] = ()

    def rows(self, layer: str, inputs: Tensor) -> Tensor:
        """Return the real tokens (N, n) among the inputs of `layer`.

        Three shapes of inputs are understood: (batch, length, ..., n), (batch * length, n), and
        (length, batch, n) unless both sizes are equal.

        Raises:
            ConfigError: the batch has padding, and the inputs have another shape, such as the
                tokens that a router has gathered for one expert.
        """
        batch, length = self.is_real.shape
        width, leading = inputs.shape[-1], tuple(inputs.shape[:-1])
        if any(inputs is other for other in self.others) or bool(self.is_real.all()):
            return inputs.reshape(-1, width)
        if leading[:2] == (batch, length):
            return inputs[self.is_real].reshape(-1, width)
        if leading == (batch * length,):
            return inputs[self.is_real.flatten()]
        if leading == (length, batch):
            return inputs.transpose(0, 1)[self.is_real]
        raise ConfigError(
            f"{layer}: its inputs have the shape {tuple(inputs.shape)}, in which the padding of a "
            f"batch of {batch} x {length} tokens cannot be found; set model.emulator_targets "
            "(targets in emloc.build_emulator) to layers without it, or pass batches "
            "without padding"
        )


def read_mask(attention_mask: Any) -> Tensor:
    """Return the attention mask of a batch as (batch, length), true for real tokens.

    Raises:
        ConfigError: the mask has another shape, or the batch has no real token.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        shape = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else "none"
        raise ConfigError(
            f"attention_mask of a calibration batch: its shape is {shape}, so it does not say "
            "which tokens are padding; pass a mask (batch, length), 1 for tokens, 0 for padding"
        )
    is_real = attention_mask.bool()
    if not is_real.any():
        raise ConfigError(
            "attention_mask of a calibration batch: it is 0 everywhere, so the batch has no token "
            "to learn from; leave this batch out, or correct its mask"
        )
    return is_real


def other_sequences(kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    """Return the tensors of other sequences among the keyword arguments of a block."""
    values = (kwargs.get(name) for name in OTHER_SEQUENCES)
    return tuple(value for value in values if isinstance(value, Tensor))
