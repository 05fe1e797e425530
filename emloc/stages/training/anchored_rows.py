"""What an anchored training needs beside the emulator: places, rows in their order, and rounds."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from emloc.adapters.training_inputs import TrainingInputs
from emloc.anchors import Anchor
from emloc.anchors.batches import KeyedRow
from emloc.anchors.guard import guard_rows
from emloc.anchors.pass_states import most_states
from emloc.anchors.places import Place
from emloc.anchors.record import Original, RowLoss, Rows, Stretches, record
from emloc.calibration.batch_size import batch_tokens
from emloc.calibration.blockwise import by_block
from emloc.calibration.offload import StateLimits
from emloc.data.reader import encode_all, training_collate
from emloc.emulators.full import block_linears
from emloc.emulators.layer_drop import block_stack
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import Source
from emloc.runtime.folders import existing_folder
from emloc.runtime.memory import GIB
from emloc.stages.training.order import RowOrder, order_of
from emloc.tensors.nn.attention import without_cudnn

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AnchoredRows:
    """The rows of an anchored training in their order, and the places of its offsets."""

    anchor: Anchor
    source: Source
    places: list[Place]
    blocks: list[str]  # all blocks of the model
    decoder_blocks: list[str]
    rows: list[KeyedRow]  # to train on
    guard: list[KeyedRow]  # to measure the original's loss on
    order: RowOrder
    round_ends: list[int]  # step at which each round ends
    collate: Callable[[list[Any]], dict[str, Any]]
    disk_gib: float  # most disk that the offsets of a round may take

    @classmethod
    def of(
        cls,
        anchor: Anchor,
        source: Source,
        rows: list[KeyedRow],
        guard: list[KeyedRow],
        order: RowOrder,
        steps: int,
        collate: Callable[[list[Any]], dict[str, Any]],
        disk_gib: float,
    ) -> Self:
        """Return the rows with the places of a model, and the rounds of so many steps.

        Raises:
            ConfigError: the model does not have the places.
        """
        decoder_blocks = block_stack(source)
        return cls(
            anchor,
            source,
            anchor.find(source.meta_model, decoder_blocks),
            list(by_block(block_linears(source))),
            decoder_blocks,
            rows,
            guard,
            order,
            round_ends(steps, anchor.rounds),
            collate,
            disk_gib,
        )

    def of_steps(self, first: int, end: int) -> list[KeyedRow]:
        """Return the rows of some steps; a row that is drawn twice comes once."""
        return unique(self.rows[index] for index in self.order.of_steps(first, end))

    def record(
        self,
        folder: Path,
        original: Original,
        stretches: Stretches | None,
        rows: Sequence[KeyedRow],
        measured: Sequence[KeyedRow],
        *,
        device: torch.device,
        limits: StateLimits,
    ) -> dict[str, RowLoss]:
        """Run one pass; see `emloc.anchors.record`.

        Raises:
            ConfigError: the disk is too small for the offsets.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._require_disk(folder, rows)
        batch = Rows(
            rows,
            measured,
            self.collate,
            self.source.objective,
            batch_tokens(self.source.config.get_text_config().hidden_size, device),
        )
        with without_cudnn():
            return record(
                folder,
                original,
                stretches,
                batch,
                self.blocks,
                self.decoder_blocks,
                device=device,
                limits=limits,
            )

    def _require_disk(self, folder: Path, rows: Sequence[KeyedRow]) -> None:
        tokens = [sum(place.count(keyed.row) for keyed in rows) for place in self.places]
        if line := disk_shortage(self.anchor, self.source, tokens, folder, self.disk_gib):
            raise ConfigError(line)


def anchored_rows(
    anchor: Anchor, source: Source, training_inputs: TrainingInputs, disk_gib: float
) -> AnchoredRows:
    """Read the training rows and return them with places and rounds.

    `disk_gib` is the most disk that the offsets of a round may take.

    Raises:
        ConfigError: a row cannot be read, the guard takes all of them, or the model does not have
            the places.
    """
    reader, recipe = source.reader(), training_inputs.recipe
    encoded = encode_all(reader, training_inputs.examples, training_inputs.max_length)
    keyed = [KeyedRow(row, row.key) for row in encoded]
    indices = guard_rows(len(encoded), anchor.guard, training_inputs.seed)
    guard = unique(keyed[index] for index in indices)
    # A data set may have a row twice, so the guard is left out by its keys.
    guard_keys = {row.key for row in guard}
    rows = [row for row in keyed if row.key not in guard_keys]
    if not rows:
        raise ConfigError(
            f"anchor.guard={anchor.guard}: all training rows equal those that measure the rounds, "
            "so none is left to train on; set anchor.guard=0"
        )
    return AnchoredRows.of(
        anchor,
        source,
        rows,
        guard,
        order_of(rows, recipe, training_inputs.seed),
        recipe.steps,
        training_collate(reader),
        disk_gib,
    )


def round_ends(steps: int, rounds: int) -> list[int]:
    """Return the step at which each round ends; rounds differ by at most one step."""
    return [round(steps * (index + 1) / rounds) for index in range(rounds)]


def disk_shortage(
    anchor: Anchor,
    source: Source,
    tokens: Sequence[int],
    folder: Path,
    limit_gib: float,
    refit_bytes: int = 0,
) -> str | None:
    """Return why the offsets of some rows do not fit on the disk, in one line; None if they do.

    Beside them have to fit the hidden states of the pass, or what a fit of the emulator writes.

    Args:
        anchor: the format of the offsets.
        source: the original.
        tokens: for each place, the number of tokens with an offset.
        folder: of the offsets.
        limit_gib: most disk that the offsets may take.
        refit_bytes: what a fit of the emulator behind the pass writes.
    """
    width = source.config.get_text_config().hidden_size
    size = sum(tokens) * anchor.stored_as.token_bytes(width)
    if size > limit_gib * GIB:
        return (
            f"anchor: the offsets of a round take {size / GIB:.3g} GiB ({max(tokens)} tokens at "
            f"{len(tokens)} {'places' if len(tokens) > 1 else 'place'}), and "
            f"budget.disk_gib={limit_gib:g}; set anchor.rounds or budget.disk_gib higher, or "
            "anchor.dtype=int8"
        )
    states = most_states(tokens, width * source.dtype.itemsize)
    existing = existing_folder(folder)
    free = shutil.disk_usage(existing).free
    if size + states > free:
        return (
            f"anchor: a round takes {(size + states) / GIB:.3g} GiB of disk, and {existing} has "
            f"{free / GIB:.3g} GiB free; set anchor.rounds higher, anchor.dtype=int8, or "
            "EMLOC_CACHE to a folder on another disk"
        )
    if size + refit_bytes > free:
        return (
            f"anchor: a round with a new fit of the emulator takes {(size + refit_bytes) / GIB:.3g}"
            f" GiB of disk, and {existing} has {free / GIB:.3g} GiB free; set anchor.refit=false, "
            "or EMLOC_CACHE to a folder on another disk"
        )
    return None


def unique(rows: Iterable[KeyedRow]) -> list[KeyedRow]:
    """Return the rows without repetitions of a key."""
    return list({row.key: row for row in rows}.values())
