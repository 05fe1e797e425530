"""Passes of the original over the rows of a round, for anchors in a user's own loop."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from emloc.anchors.batches import KeyedRow
from emloc.anchors.formats import OffsetFormat
from emloc.anchors.places import Place
from emloc.anchors.record import RowLoss, Rows, Stretches, record
from emloc.calibration.batch_size import batch_tokens
from emloc.calibration.offload import StateLimits
from emloc.errors import ConfigError
from emloc.library.anchored_original import adapted_original, adapter_digest
from emloc.library.anchored_rows import RowTable
from emloc.library.emulate import eval_mode
from emloc.models.objectives.answer_logits import forward_logits
from emloc.models.objectives.token_scores import score_tokens
from emloc.models.objectives.tokens import Tokens
from emloc.runtime.digest import digest
from emloc.runtime.folders import existing_folder
from emloc.runtime.memory import GIB, free_device_bytes
from emloc.tensors.nn.attention import without_cudnn

log = logging.getLogger(__name__)

# Shares of the free memory that hidden states of a pass may take; the rest goes to disk.
_DEVICE_SHARE, _HOST_SHARE = 0.1, 0.5


@dataclass(frozen=True)
class Passes:
    """Both models, the rows, and how the offsets between the models are stored."""

    original: PreTrainedModel
    emulator: nn.Module
    table: RowTable
    places: Sequence[Place]
    stored_as: OffsetFormat
    blocks: Sequence[str]  # of the original
    decoder_blocks: Sequence[str]
    key: str  # digest of all of this but the rows
    batch_tokens: int | None  # of one batch; None: as many as the device has room for
    context: Callable[[], AbstractContextManager[Any]]  # that the loop calls the emulator in

    def record(self, parent: Path, positions: range) -> tuple[Path, float | None]:
        """Record the offsets of the rows at some positions, or find them from an earlier call.

        Returns:
            The folder of the offsets in `parent`, and the original's mean loss of a labelled token;
            None without labels.

        Raises:
            ConfigError: the adapter is no plain LoRA, or the disk is too small.
        """
        adapter = adapter_digest(self.emulator)
        rows = self.table.of(positions)
        folder = parent / digest(
            [self.key, adapter, self._computation(), [row.key for row in rows]]
        )
        if not folder.exists():
            self._require_disk(parent, rows)
        text = self.original.config.get_text_config()
        size = self.batch_tokens or batch_tokens(text.hidden_size, self._device)
        log.info(
            "anchors: the original %s is run over %d rows",
            "with the adapter" if adapter else "without an adapter",
            len(rows),
        )
        with eval_mode(self.emulator), without_cudnn():
            losses = record(
                folder,
                adapted_original(self.original, self.emulator),
                Stretches(self._transformer, self.places, self.stored_as, self.context),
                Rows(rows, [], self.table.batch, LabelledTokens(), size),
                self.blocks,
                self.decoder_blocks,
                device=self._device,
                limits=_free_memory(self._device),
            )
        return folder, _mean_loss(losses)

    @property
    def _transformer(self) -> PreTrainedModel:
        assert isinstance(self.emulator, PreTrainedModel)
        return self.emulator

    @property
    def _device(self) -> torch.device:
        device = next(self.emulator.parameters()).device
        assert isinstance(device, torch.device)
        return device

    def _computation(self) -> list[str]:
        """Return the dtypes that the emulator computes in."""
        kind = self._device.type
        with self.context():
            is_mixed = torch.is_autocast_enabled(kind)
            mixed = str(torch.get_autocast_dtype(kind)) if is_mixed else ""
        return [mixed, *sorted({str(p.dtype) for p in self.emulator.parameters()})]

    def _require_disk(self, parent: Path, rows: Sequence[KeyedRow]) -> None:
        """Check that the offsets of some rows fit on the disk, and the hidden states beside them.

        Raises:
            ConfigError: they do not.
        """
        width = self.original.config.get_text_config().hidden_size
        tokens = sum(row.length for row in rows)
        size = tokens * len(self.places) * self.stored_as.token_bytes(width)
        # Of two models behind two places.
        size += 4 * tokens * width * self.original.dtype.itemsize
        existing = existing_folder(parent)
        free = shutil.disk_usage(existing).free
        if size > free:
            raise ConfigError(
                f"the anchors of {len(rows)} rows take {size / GIB:.3g} GiB of disk, and "
                f"{existing} has {free / GIB:.3g} GiB free; pass fewer rows a round (round_rows), "
                "fewer places, dtype='int8', or a folder on another disk"
            )


class LabelledTokens(Tokens):
    """The loss of the labels that a user's collation makes, if it makes labels for tokens."""

    def row_losses(
        self, model: Any, rows: Sequence[Any], batch: dict[str, Any]
    ) -> list[tuple[float, int]]:
        """Negative log-likelihood and number of the labelled tokens of each row; else zeros."""
        logits, labels = forward_logits(model, batch), batch.get("labels")
        if logits is None or labels is None or labels.shape != logits.shape:
            return [(0.0, 0) for _ in rows]
        scores = score_tokens(logits, labels)
        sums = scores.nll.sum(-1).tolist(), scores.is_answer.sum(-1).tolist()
        return list(zip(*sums, strict=True))


def _mean_loss(losses: Mapping[str, RowLoss]) -> float | None:
    """Return the mean loss of a token over all rows; None without labelled tokens."""
    count = sum(items for _, items in losses.values())
    return sum(total for total, _ in losses.values()) / count if count else None


def _free_memory(device: torch.device) -> StateLimits:
    """Return the memory for hidden states: a share of what is free now."""
    host = psutil.virtual_memory().available
    return StateLimits(int(free_device_bytes(device) * _DEVICE_SHARE), int(host * _HOST_SHARE))
