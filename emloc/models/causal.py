"""Which models need no attention mask for padding behind the text, and how to spare it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import masking_utils


def is_causal(decoder: nn.Module) -> bool:
    """Return whether all attention modules of a decoder say that no token sees those behind it."""
    marks = [getattr(module, "is_causal", None) for module in decoder.modules()]
    stated = [mark for mark in marks if mark is not None]
    return bool(stated) and all(stated)


@contextmanager
def unmasked() -> Iterator[None]:
    """Let transformers build no causal mask inside the block for batches without a mask.

    While a CUDA graph is recorded, transformers builds one even so: without a look at the values of
    the positions it cannot know that a row is not several sequences. Here it never is. Attention
    with a mask takes several times as long.
    """
    replaced: dict[str, Any] = {
        "find_packed_sequence_indices": lambda position_ids: None,
        "is_tracing": lambda tensor=None: False,
    }
    before = {name: getattr(masking_utils, name) for name in replaced}
    vars(masking_utils).update(replaced)
    try:
        yield
    finally:
        vars(masking_utils).update(before)
