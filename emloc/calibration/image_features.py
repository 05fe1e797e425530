"""Compute what the vision tower of a model hands to its language model, block by block.

The model's own `forward` calls its tower, with whatever arguments that needs. The pass ends when
the tower has returned, so the language model is never read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent
from torch import Tensor, nn

from emloc.calibration.blockwise import by_block, iterate_blocks
from emloc.calibration.offload import UNLIMITED, StateLimits
from emloc.models.block_names import find_block
from emloc.models.checkpoint.source import Source
from emloc.models.checkpoint.tower import feature_owner
from emloc.runtime.progress import tracked

# Called with the index of a batch, and what `get_image_features` has returned for it.
Keep = Callable[[int, Any], None]


class _NoVectors(nn.Module):
    """Stands for the token embedding, whose vectors the tower does not read."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._width, self._dtype = width, dtype

    def forward(self, ids: Tensor) -> Tensor:
        """Return zeros (..., d) for token ids (...,)."""
        return torch.zeros(*ids.shape, self._width, dtype=self._dtype, device=ids.device)


def compute_features(
    source: Source,
    collate: Callable[[int], Mapping[str, Any]],
    count: int,
    keep: Keep,
    *,
    device: torch.device,
    limits: StateLimits = UNLIMITED,
    folder: Path | None = None,
) -> None:
    """Run the tower and projector of a model over batches, with one block on the device at a time.

    Args:
        source: the model.
        collate: returns a batch by its index; it is called when the batch's pass begins.
        count: number of batches.
        keep: gets the features of a batch, as soon as they are computed.
        device: where the tower runs.
        limits: memory for the hidden states.
        folder: for hidden states on disk; None: the system's temporary folder.

    Raises:
        ConfigError: the disk is full.
    """
    model = source.skeleton().eval()
    inside = tuple(f"{name}." for name in source.tower)
    linears = [name for name in source.linears if name.startswith(inside)]
    blocks = list(by_block(name for name in linears if find_block(name)))
    in_blocks = tuple(f"{name}." for name in blocks)
    names = [*(name for name, _ in model.named_parameters()), *source.buffers]
    outside = [n for n in names if n.startswith(inside) and not n.startswith(in_blocks)]
    source.fill(model, outside, device)
    width = source.config.get_text_config().hidden_size
    model.set_input_embeddings(_NoVectors(width, source.dtype))

    owner, indices = feature_owner(model), dict[Any, int]()
    compute = owner.get_image_features

    def keep_features(*args: Any, **kwargs: Any) -> None:
        keep(indices[getcurrent()], compute(*args, **kwargs))
        raise GreenletExit  # ends the pass

    owner.get_image_features = keep_features

    def call(index: int) -> Callable[[dict[str, Any]], None]:
        def run(inputs: dict[str, Any]) -> None:
            indices[getcurrent()] = index
            model(**inputs)

        return run

    passes = iterate_blocks(
        model,
        (collate(index) for index in range(count)),
        blocks,
        device,
        source,
        limits=limits,
        folder=folder,
        calls=[call(index) for index in range(count)],
        end=lambda: None,
    )
    for block in tracked(passes, "features", len(blocks), "block"):
        block.run(lambda _: None)


def split_features(features: Tensor, tokens: Sequence[int]) -> list[Tensor] | None:
    """Split the features (n, ..., d) of several rows by the number of their image tokens.

    None if they do not have as many tokens.
    """
    per_item = features[0, ..., 0].numel() if len(features) else 1
    sizes = [count // per_item for count in tokens]
    if any(count % per_item for count in tokens) or sum(sizes) != len(features):
        return None
    return list(torch.split(features, sizes))
