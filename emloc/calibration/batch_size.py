"""How many tokens of a pass fit on the device at once, and which rows become a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from emloc.runtime.memory import free_device_bytes

# Share of the free memory of the device that one batch of a pass may take.
_DEVICE_SHARE = 1 / 8
# Memory of one batch on a CPU, in bytes.
_CPU_BYTES = 2**30
# Bytes that a block takes for a token, for each feature of the hidden states: those of attention
# and of the MLP in 16 bits, and norms in float32.
_FEATURE_BYTES = 64
# Fewest and most tokens of a batch: below, the weights are used too little, above, nothing is won.
_TOKENS = (512, 8192)


def batch_tokens(width: int, device: torch.device) -> int:
    """Return how many tokens a batch of a pass may have, so that one block of it fits.

    Args:
        width: features of the hidden states.
        device: on which the pass runs.
    """
    budget = _CPU_BYTES
    if device.type == "cuda":
        budget = int(free_device_bytes(device) * _DEVICE_SHARE)
    least, most = _TOKENS
    return min(max(budget // (_FEATURE_BYTES * width), least), most)


def group_by_tokens(lengths: Sequence[int], tokens: int, least: int = 1) -> list[list[int]]:
    """Return indices of rows in batches of similar lengths.

    Args:
        lengths: tokens of each row.
        tokens: most tokens of a batch, padding included.
        least: rows that a batch has even if they exceed `tokens`; the last batch may have fewer.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        # In this order the newest row is the longest of its batch.
        size = len(batches[-1]) if batches else 0
        if size and (size < least or lengths[index] * (size + 1) <= tokens):
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
