"""Hooks that put an emulator back onto the original's hidden states in a user's own loop."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emloc.adapters.recoverable import adapters_of
from emloc.anchors.attached import AttachedOffsets
from emloc.anchors.batches import BatchOffsets, TokenOffsets, read_tokens
from emloc.anchors.formats import OffsetFormat
from emloc.anchors.places import Place
from emloc.anchors.positions import Positions
from emloc.anchors.shards import OffsetReader
from emloc.calibration.offload import tensors_in
from emloc.errors import ConfigError
from emloc.library.anchored_rows import ROWS, UNKNOWN, BatchRows, RowTable
from emloc.library.draw_order import DrawOrder
from emloc.library.identity import note_anchored
from emloc.runtime.distributed import world_size


class AnchoredForward:
    """Takes the rows of a batch out of each call of the emulator, and adds their offsets.

    A batch of another collation is refused in training, and computed without offsets otherwise. A
    thread reads the offsets of the next rows ahead.
    """

    def __init__(
        self,
        owner: str,
        emulator: nn.Module,
        table: RowTable,
        places: Sequence[Place],
        stored_as: OffsetFormat,
    ) -> None:
        self._owner, self._emulator, self._table = owner, emulator, table
        self._places = places
        self._offsets = AttachedOffsets(places, stored_as)
        self._order = DrawOrder(table.order)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="offsets")
        self._stack = ExitStack()
        self._reader: OffsetReader | None = None
        self._window = range(0)
        self._slack = 0
        self._ahead: tuple[list[int], Future[list[dict[str, Tensor]]]] | None = None

    @property
    def is_window_drawn(self) -> bool:
        """Whether all processes have drawn the rows of the present window."""
        drawn_to = self._order.next
        return drawn_to is not None and self._window.stop - drawn_to <= self._slack

    def attach(self, folder: Path, window: range) -> None:
        """Attach the hooks, with the offsets in `folder` of the rows at the window's positions."""
        self._reader, self._window = OffsetReader([folder]), window
        # Hooks are functions, so that an emulator with them can be copied.
        before = self._emulator.register_forward_pre_hook(
            lambda model, args, kwargs: self._before(model, args, kwargs), with_kwargs=True
        )
        after = self._emulator.register_forward_hook(lambda _, __, output: self._after(output))
        self._stack.callback(before.remove)
        self._stack.callback(after.remove)
        self._stack.enter_context(self._offsets.attached(self._emulator))

    def detach(self) -> None:
        """Remove the hooks, and forget the offsets."""
        self._stack.close()
        self._reader, self._ahead = None, None

    def close(self) -> None:
        """Remove the hooks and end the thread."""
        self.detach()
        self._thread.shutdown(cancel_futures=True)

    # The hooks.

    # Without the decorator, torch.compile would compile the reading of files.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Set the offsets of a batch, and return the arguments of the call without its rows."""
        if getattr(model, "_is_replica", False):
            raise ConfigError(
                "anchors do not work in nn.DataParallel; use DistributedDataParallel, or one GPU "
                "(CUDA_VISIBLE_DEVICES=0)"
            )
        arguments = {name: value for name, value in kwargs.items() if name != ROWS}
        rows: BatchRows | None = kwargs.get(ROWS)
        is_training = torch.is_grad_enabled()
        if rows is None and is_training:
            raise ConfigError(
                "a training batch has no rows of emloc.anchor; collate with anchors.collate, or "
                "call anchors.close() to train without anchors"
            )
        self._offsets.offsets = None
        if rows is None:
            return args, arguments
        if rows.owner != self._owner:
            raise ConfigError(
                "a batch was collated for the anchors of another emulator; collate with the "
                "anchors.collate that emloc.anchor returned for this one"
            )
        if is_training:
            self._follow(rows.numbers)
            note_anchored(model, adapters_of(model)[0])
        elif not self._covers(rows.numbers):
            return args, arguments
        self._offsets.offsets = self._read(rows, next(model.parameters()).device)
        if is_training:
            self._read_ahead(len(rows.numbers))
        return args, arguments

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after(self, output: Any) -> None:
        """Let the backward pass of this call find its offsets again, if it computes blocks anew."""
        offsets = self._offsets.offsets
        if not torch.is_grad_enabled():
            return

        def restore(_: Tensor) -> None:
            self._offsets.offsets = offsets

        for tensor in tensors_in(output):
            if tensor.requires_grad:
                tensor.register_hook(restore)  # type: ignore[no-untyped-call]

    # The rows.

    def _covers(self, numbers: Sequence[int]) -> bool:
        """Whether all rows are among the recorded ones."""
        keys = [self._table.distinct[number].key for number in numbers if number != UNKNOWN]
        return len(keys) == len(numbers) and all(key in self._open for key in keys)

    def _follow(self, numbers: list[int]) -> None:
        """Check that a training batch holds the rows that are due.

        Raises:
            ConfigError: it holds other rows.
        """
        if UNKNOWN in numbers:
            raise ConfigError(
                "a training batch has a row that emloc.anchor was not given; pass all rows of the "
                "loop, each the same at every access (in a Trainer: remove_unused_columns=False)"
            )
        self._slack = (world_size() - 1) * len(numbers)
        self._order.advance(numbers, self._window, self._slack)

    # The offsets.

    @property
    def _open(self) -> OffsetReader:
        assert self._reader is not None
        return self._reader

    def _read(self, rows: BatchRows, device: torch.device) -> BatchOffsets:
        """Return the offsets of a batch at the positions of its tokens, on the device."""
        if self._ahead is not None and self._ahead[0] == rows.numbers:
            tokens = self._ahead[1].result()
        else:
            tokens = self._tokens(self._open, rows.numbers)
        self._ahead = None
        return [TokenOffsets(parts, Positions.of(rows.mask)).padded(device) for parts in tokens]

    def _read_ahead(self, count: int) -> None:
        """Let the thread read the offsets of the next rows."""
        assert self._order.next is not None
        first = self._order.next + self._slack
        numbers = self._table.order[first : min(first + count, self._window.stop)]
        if numbers:
            self._ahead = (numbers, self._thread.submit(self._tokens, self._open, numbers))

    def _tokens(self, reader: OffsetReader, numbers: Sequence[int]) -> list[dict[str, Tensor]]:
        """For each place: name of a part -> the offsets of all rows' tokens, (tokens, ...)."""
        keys = [self._table.distinct[number].key for number in numbers]
        pinned = torch.cuda.is_available()
        return [
            read_tokens(reader, keys, place, pinned=pinned) for place in range(len(self._places))
        ]
