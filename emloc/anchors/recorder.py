"""Record the offsets of a pass by hooks at the places of the original and of the emulator.

Both models run batch by batch in coroutines. At a place, the hook of the original writes its hidden
states to a file. The hook of the emulator reads them, records the offset, and adds it as it is
stored, so that the next place begins with what training will have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from greenlet import getcurrent
from torch import Tensor, nn

from emloc.anchors.attached import put_back
from emloc.anchors.batch_plan import BatchPlan
from emloc.anchors.formats import OffsetFormat, Parts
from emloc.anchors.pass_states import PassStates
from emloc.anchors.places import Change, Place
from emloc.anchors.positions import Positions
from emloc.anchors.shards import shard_file, write_shard
from emloc.anchors.write_behind import HostCopy, WriteBehind
from emloc.errors import ConfigError


class OffsetRecorder:
    """Writes the offsets at all places into a folder, and the states of a killed pass."""

    def __init__(
        self, folder: Path, places: Sequence[Place], plan: BatchPlan, keys: Sequence[str]
    ) -> None:
        self.writer = WriteBehind()
        self.states = PassStates(folder, self.writer)
        self._folder, self._places, self._plan, self._keys = folder, places, plan, keys
        # Coroutine of a forward pass -> index of its batch.
        self._batch_index: dict[object, int] = {}
        self._positions: dict[int, list[Positions]] = {}  # batch -> those of each place
        self._open_shard: list[tuple[int, dict[str, HostCopy]]] = []  # batches and their parts

    def note_batch(self, index: int, batch: Mapping[str, Any]) -> None:
        """Remember which positions of a batch have offsets."""
        self._positions[index] = [Positions.of(place.tokens(batch)) for place in self._places]

    def begin(self, index: int) -> None:
        """Remember that the present coroutine runs a model on a batch."""
        self._batch_index[getcurrent()] = index

    def attach(
        self,
        stack: ExitStack,
        original: nn.Module,
        emulator: nn.Module,
        stored_as: OffsetFormat,
        finished: int,
    ) -> None:
        """Attach the hooks of all places that are not finished, until the stack is closed."""
        for index, place in enumerate(self._places):
            if index >= finished:
                handles = (
                    place.attach(original, self._keeping(index)),
                    place.attach(emulator, self._recording(index, stored_as)),
                )
                for handle in handles:
                    stack.callback(handle.remove)

    def finish_place_behind(self, block: str) -> None:
        """End the place behind a block, if there is one: a killed pass may go on from there."""
        for index, place in enumerate(self._places):
            if place.module == block and not place.at_input:
                self.states.finish(index)

    def skip(
        self,
        stack: ExitStack,
        models: Mapping[str, nn.Module],
        blocks: Sequence[str],
        place: int,
    ) -> None:
        """Replace finished blocks by the hidden states behind them, until the stack is closed.

        Args:
            stack: puts the blocks back.
            models: `original` and, if it runs, `emulator`.
            blocks: names of the finished blocks.
            place: the one behind the last of them.
        """
        for kind, model in models.items():
            for name in blocks:
                block = model.get_submodule(name)
                stored = place if name == blocks[-1] else None
                block.forward = self.states.stand_in(kind, stored, lambda: self._present(place))
                stack.callback(block.__dict__.pop, "forward")

    def _present(self, place: int) -> tuple[int, Positions]:
        """Return the index of the present batch, and which positions have offsets at a place."""
        index = self._batch_index[getcurrent()]
        return index, self._positions[index][place]

    # The hooks.

    def _keeping(self, place: int) -> Change:
        """Return the hook of the original at a place, which writes its hidden states to a file."""

        def keep(hidden: Tensor) -> Tensor:
            index, positions = self._present(place)
            self.states.save("original", place, index, self._select(hidden, place, positions))
            return hidden

        return keep

    def _recording(self, place: int, stored_as: OffsetFormat) -> Change:
        """Return the hook of the emulator at a place, which records offsets and applies them."""

        def record(hidden: Tensor) -> Tensor:
            index, positions = self._present(place)
            own = self._select(hidden, place, positions)
            target = self.states.load("original", place, index, hidden.device)
            wide = torch.promote_types(hidden.dtype, torch.float32)
            parts = stored_as.encode(target.to(wide) - own.to(wide))
            anchored = put_back(own, stored_as.decode(parts, hidden.shape[-1]))
            if self.states.marks(place):
                self.states.save("emulator", place, index, anchored)
            self._add_to_shard(place, index, parts)
            return positions.put(anchored, hidden)

        return record

    def _select(self, hidden: Tensor, place: int, positions: Positions) -> Tensor:
        """Return the hidden states (N, d) of the positions with offsets.

        Raises:
            ConfigError: the hidden states have another shape than the tokens.
        """
        if hidden.shape[:2] != positions.shape:
            raise ConfigError(
                f"anchor: the hidden states at {self._places[place].module} have the shape "
                f"{tuple(hidden.shape)}, and not those of a batch of {tuple(positions.shape)} "
                "tokens; set anchor=none"
            )
        return positions.select(hidden)

    def _add_to_shard(self, place: int, batch: int, parts: Parts) -> None:
        """Add the offsets of a batch to the open shard; write the shard after its last batch."""
        copies = {name: self.writer.copy(part) for name, part in parts.items()}
        self._open_shard.append((batch, copies))
        for shard, batches in enumerate(self._plan.shards):
            if batch == batches[-1]:
                content, self._open_shard = self._open_shard, []
                path = shard_file(self._folder, place, shard)
                nbytes = sum(c.tensor.nbytes for _, copies in content for c in copies.values())
                self.writer.submit(partial(self._write_shard, path, place, content), nbytes)

    def _write_shard(
        self, path: Path, place: int, content: Sequence[tuple[int, Mapping[str, HostCopy]]]
    ) -> None:
        """Write the offsets of some batches to a file."""
        offsets: dict[str, Parts] = {}
        for batch, copies in content:
            counts = self._positions[batch][place].counts
            pieces = {name: torch.split(copy.complete(), counts) for name, copy in copies.items()}
            for number, row in enumerate(self._plan.batches[batch]):
                offsets[self._keys[row]] = {name: piece[number] for name, piece in pieces.items()}
        write_shard(path, offsets)
