"""Hidden states of a pass on disk, from which a killed pass goes on behind its last finished place.

The states of the original and of the emulator behind a place are written batch by batch. When both
models are behind the place, it is marked as finished, and the states of the place before are
deleted.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from emloc.anchors.positions import Positions
from emloc.anchors.shards import shard_file
from emloc.runtime.atomic import write_json
from emloc.runtime.manifest import file_hash
from emloc.runtime.safetensors_file import write_safetensors

log = logging.getLogger(__name__)


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
        tuple_size: length of the tuple that a block of the original returns; 0: it is a tensor.
    """

    def __init__(self, offsets: Path) -> None:
        self.folder = offsets / "states"
        self.tuple_size = 0
        self._offsets = offsets
        self.folder.mkdir(parents=True, exist_ok=True)

    def save(self, model: str, place: int, batch: int, hidden: Tensor) -> None:
        """Write the hidden states of a model (N, d), at the tokens of a batch with offsets."""
        path = self._file(model, place, batch)
        write_safetensors(path, {"hidden": hidden}, {}, durable=False)

    def load(self, model: str, place: int, batch: int) -> Tensor:
        """Return the hidden states (N, d) that `save` wrote."""
        return load_file(self._file(model, place, batch))["hidden"]

    def _file(self, model: str, place: int, batch: int) -> Path:
        return self.folder / f"{model}-{place:03d}-{batch:05d}.safetensors"

    def finish(self, place: int) -> None:
        """Mark a place as finished, and delete the states of the places before."""
        hashes = {
            path.name: file_hash(path) for path in self.folder.glob(f"*-{place:03d}-*.safetensors")
        }
        facts = {"tuple_size": self.tuple_size, "hashes": hashes}
        write_json(self.folder / f"finished-{place:03d}.json", facts)
        for path in self.folder.glob("*.safetensors"):
            if int(path.stem.split("-")[1]) < place:
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
                hidden_states = positions.padded(self.load(model, place, index).to(hidden_states))
            if not self.tuple_size:
                return hidden_states
            return (hidden_states, *[None] * (self.tuple_size - 1))

        return forward
