"""Add offsets to the hidden states of an emulator while it is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from emloc.anchors.batches import BatchOffsets
from emloc.anchors.formats import OffsetFormat
from emloc.anchors.places import Change, Place


class AttachedOffsets:
    """Hooks at the places of an emulator, which add the offsets of the present batch.

    `offsets` has to be set before each forward pass. It must stay until the backward pass is over,
    which may compute blocks again. None: the emulator runs as it is.
    """

    def __init__(self, places: Sequence[Place], stored_as: OffsetFormat) -> None:
        self.offsets: BatchOffsets | None = None
        self._places, self._format = places, stored_as

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Attach the hooks to a model with the modules of the places, until the block ends."""
        handles = [
            place.attach(model, self._change(index)) for index, place in enumerate(self._places)
        ]
        try:
            yield
        finally:
            self.offsets = None
            for handle in handles:
                handle.remove()

    def _change(self, index: int) -> Change:
        def change(hidden: Tensor) -> Tensor:
            if self.offsets is None:
                return hidden
            return put_back(hidden, self._format.decode(self.offsets[index], hidden.shape[-1]))

        return change


def put_back(hidden: Tensor, offsets: Tensor) -> Tensor:
    """Return hidden states (..., d) plus decoded offsets, in the dtype of the hidden states.

    The recording of offsets and the training both use this sum, so that they round alike.
    """
    return hidden + offsets.to(hidden.dtype)
