"""Hidden states of a pass on disk, from which a killed pass goes on behind its last finished place.

The states of the original and of the emulator behind a place are written batch by batch. When both
models are behind the place, it is marked as finished, and the states of the place before are
deleted. All this happens behind the pass, in a thread.

A fast pass marks few places: to repeat a minute is cheaper than to write the states of each place,
which are twice as large as the offsets.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Container, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from emloc.anchors.positions import Positions
from emloc.anchors.shards import shard_file
from emloc.anchors.write_behind import HostCopy, WriteBehind
from emloc.runtime.atomic import write_json
from emloc.runtime.manifest import file_hash
from emloc.runtime.safetensors_file import write_safetensors

log = logging.getLogger(__name__)

# Seconds of a pass that may have to be repeated.
MOST_REPEATED = 60.0


def most_states(tokens: Sequence[int], token_bytes: int) -> int:
    """Return how many bytes the states of a pass take at most.

    They are those of two models behind two places: the finished one and the next.

    Args:
        tokens: for each place, the number of tokens with an offset.
        token_bytes: of the hidden states of one token.
    """
    return 2 * sum(sorted(tokens)[-2:]) * token_bytes


class PassStates:
    """The states of one pass, in a folder inside that of its offsets.

    Attributes:
        folder: of the states.
        writer: writes them.
        tuple_size: length of the tuple that a block of the original returns; 0: it is a tensor.
    """

    def __init__(self, offsets: Path, writer: WriteBehind) -> None:
        self.folder = offsets / "states"
        self.writer = writer
        self._unwritten: dict[Path, HostCopy] = {}
        self._marks: dict[int, bool] = {}  # place -> whether it will be marked
        self._last_mark = time.monotonic()
        self.tuple_size = 0
        self._offsets = offsets
        self.folder.mkdir(parents=True, exist_ok=True)

    def save(self, model: str, place: int, batch: int, hidden: Tensor) -> None:
        """Write the hidden states of a model (N, d), at the tokens of a batch with offsets."""
        path = self._file(model, place, batch)
        copy = self._unwritten[path] = self.writer.copy(hidden)

        def write() -> None:
            write_safetensors(path, {"hidden": copy.complete()}, {}, durable=False)
            del self._unwritten[path]

        self.writer.submit(write, hidden.nbytes)

    def load(self, model: str, place: int, batch: int, device: torch.device) -> Tensor:
        """Return the hidden states (N, d) that `save` wrote, on a device."""
        path = self._file(model, place, batch)
        copy = self._unwritten.get(path)
        if copy is None:
            return load_file(path)["hidden"].to(device)
        # On the stream of the computation, behind the copy to the host.
        return copy.tensor.to(device, non_blocking=True)

    def marks(self, place: int) -> bool:
        """Return whether a place will be marked, for which it needs the emulator's states, too."""
        if place not in self._marks:
            self._marks[place] = time.monotonic() - self._last_mark >= MOST_REPEATED
        return self._marks[place]

    def _file(self, model: str, place: int, batch: int) -> Path:
        return self.folder / f"{model}-{place:03d}-{batch:05d}.safetensors"

    def finish(self, place: int) -> None:
        """Mark a place as finished, and delete the states of the places before.

        Those of a place that is not marked are deleted.
        """
        if not self.marks(place):
            self.writer.submit(partial(self._delete, [place]))
            return
        self._last_mark, tuple_size = time.monotonic(), self.tuple_size

        def mark() -> None:
            files = self.folder.glob(f"*-{place:03d}-*.safetensors")
            facts = {
                "tuple_size": tuple_size,
                "hashes": {one.name: file_hash(one) for one in files},
            }
            write_json(self.folder / f"finished-{place:03d}.json", facts)
            self._delete(range(place))

        self.writer.submit(mark)

    def _delete(self, places: Container[int]) -> None:
        """Delete the states of some places."""
        for path in self.folder.glob("*.safetensors"):
            if int(path.stem.split("-")[1]) in places:
                path.unlink()

    def finished_places(self, shards: int) -> int:
        """Return the number of places that an earlier attempt has finished.

        If a file of that attempt is damaged, its states are deleted, and the pass starts anew.
        """
        finished = sorted(self.folder.glob("finished-*.json"))
        if not finished:
            return 0
        count = int(finished[-1].stem.split("-")[1]) + 1
        facts = json.loads(finished[-1].read_text())
        if any(
            not (self.folder / name).exists() or file_hash(self.folder / name) != content
            for name, content in facts["hashes"].items()
        ) or not all(
            shard_file(self._offsets, place, shard).exists()
            for place in range(count)
            for shard in range(shards)
        ):
            log.warning("anchor: a file of the interrupted pass is damaged, so it starts anew")
            self.remove()
            self.folder.mkdir()
            return 0
        self.tuple_size = facts["tuple_size"]
        return count

    def remove(self) -> None:
        """Delete all states."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def stand_in(
        self, model: str, place: int | None, batch: Callable[[], tuple[int, Positions]]
    ) -> Callable[..., Any]:
        """Return the forward of a finished block: its input, or the states behind a place.

        `batch` returns the index of the present batch, and which positions have states.
        """

        def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
            if place is not None:
                index, positions = batch()
                states = self.load(model, place, index, hidden_states.device)
                hidden_states = positions.padded(states.to(hidden_states))
            if not self.tuple_size:
                return hidden_states
            return (hidden_states, *[None] * (self.tuple_size - 1))

        return forward
