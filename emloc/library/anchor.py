"""Anchored training in a user's own loop: put an emulator back onto its original."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

from torch import nn
from transformers import PreTrainedModel, default_data_collator

from emloc.anchors.blocks import Blocks, places_behind
from emloc.anchors.formats import FORMATS
from emloc.anchors.places import usual_places
from emloc.calibration.blockwise import by_block
from emloc.errors import ConfigError
from emloc.library.anchored_forward import AnchoredForward
from emloc.library.anchored_original import adapter_digest, require_whole
from emloc.library.anchored_passes import Passes
from emloc.library.anchored_rows import AnchoredCollate, Collate, read_rows
from emloc.library.arguments import emulator_and_stamp, original_model
from emloc.library.draw_order import FixedOrder
from emloc.library.identity import require_original
from emloc.models.block_names import find_block
from emloc.models.decoder import decoder_prefix
from emloc.runtime.digest import digest
from emloc.runtime.distributed import rank, world_size
from emloc.runtime.keys import class_name, key_of


def anchor(
    model: nn.Module,
    emulator: nn.Module,
    rows: Any,
    collate: Collate = default_data_collator,
    *,
    places: int | Sequence[int] | None = None,
    dtype: str = "bfloat16",
    round_rows: int | None = None,
    folder: str | Path | None = None,
    batch_tokens: int | None = None,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Anchors:
    """Run the original over the rows of a training, and put the emulator back onto it.

    The original is run once, block by block, with the adapter that is on the emulator. Behind some
    blocks the difference of the hidden states is stored for each token. Until the anchors are
    closed, hooks on the emulator add these offsets to each batch that `collate` of the anchors has
    made. With the adapter of the pass, the emulator then computes exactly the original with that
    adapter (in evaluation mode, up to the rounding of `dtype`). There is nothing left to correct:
    `emloc.correct(tuned, model, emulator, clamp=0)` copies the trained adapter.

    Args:
        model: the original that the emulator was built from, without an adapter, on any device. It
            does not change, and the device of the emulator holds one block of it at a time.
        emulator: of `build_emulator` or `load_emulator`, on one device, or the PEFT model over it.
            The adapter is a plain LoRA, as for `correct`, and acts on the original too. A LoRA
            that is attached later must start as a zero update, which is PEFT's default.
        rows: list or data set of the rows in the order in which the loop draws them. A row is what
            `collate` takes, and has to be the same at every access. A row that comes twice is
            stored once. Rows of an evaluation do not belong here.
        collate: makes a batch of a list of rows, as for `DataLoader`; one sequence for each row,
            padded on either side, and without any chance.
        places: number of blocks behind which the emulator is put back, spread evenly; or their
            indices, to which the last block is added. Default: 8, or all blocks of a smaller model.
        dtype: of the stored offsets, `bfloat16`, `int8` or `float32`.
        round_rows: rows of one round, for which offsets are stored at a time. `renew` has to be
            called behind each round. Default: all rows.
        folder: where offsets are stored and kept; a later call with the same models, adapter and
            rows finds them there. Default: a temporary folder, removed by `close`. Each process of
            a distributed training runs passes of its own, in a folder of its own.
        batch_tokens: tokens of one batch of the pass; default: as many as the device has room for.
        context: returns the context in which the loop calls the emulator, such as
            `partial(torch.autocast, "cuda", torch.bfloat16)`.

    Raises:
        ConfigError: the models do not belong together, the adapter is no plain LoRA, the model does
            not have the places, a row does not fit, or the disk is too small for the offsets.
    """
    base, stamp = emulator_and_stamp(emulator, "anchor(model, emulator, rows)")
    original = original_model(model)
    if not isinstance(original, PreTrainedModel) or _has_encoder(original):
        raise ConfigError(
            f"model is a {type(original).__name__}; anchors need a model of transformers with one "
            "stack of blocks over tokens, not an encoder with a decoder"
        )
    if round_rows is not None and round_rows < 1:
        raise ConfigError(f"round_rows={round_rows}: a round has rows; pass 1 or more")
    require_original(original, stamp, stamp.weights)
    require_whole(base)
    adapter_digest(base)  # refuses an adapter before any row is read
    blocks, decoder_blocks = _blocks(original)
    if dtype not in FORMATS:
        raise ConfigError(f"dtype={dtype!r} is none of {', '.join(FORMATS)}; pass dtype='bfloat16'")
    count = usual_places(len(decoder_blocks)) if places is None else places
    block_places = places_behind(original, decoder_blocks, count)
    key = {"part": class_name(Blocks), "dtype": dtype, "places": key_of(count)}
    passes = Passes(
        original,
        base,
        read_rows(rows, collate, original),
        block_places,
        FORMATS[dtype],
        blocks,
        decoder_blocks,
        digest([stamp.digest, str(original.dtype), key]),
        batch_tokens,
        context,
    )
    return Anchors(passes, round_rows, None if folder is None else Path(folder))


def _has_encoder(model: PreTrainedModel) -> bool:
    """Whether the tokens of a batch are those of an encoder, which the blocks of a decoder read."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def _blocks(model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Return the names of all blocks of a model, and of those that process tokens."""
    linears = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    blocks = list(by_block(name for name in linears if find_block(name) not in (None, name)))
    prefix = decoder_prefix(model)
    return blocks, [block for block in blocks if block.startswith(prefix)]


class Anchors:
    """The anchors of an emulator for one training; `emloc.anchor` makes them.

    As a context manager, they are closed at the end of the block.

    Attributes:
        sampler: draws the rows in their order, for `DataLoader`.
        collate: for `DataLoader` and `Trainer`. Its batches have one more item, which the emulator
            takes out of the call. Batches of other rows are only refused while gradients are on.
        loss: mean loss of a labelled token of the original with the adapter of the last pass, over
            the rows of the round; None if the batches have no labels for tokens.
    """

    def __init__(self, passes: Passes, round_rows: int | None, folder: Path | None) -> None:
        owner = uuid4().hex
        table = passes.table
        self.sampler = FixedOrder(len(table.order))
        self.collate = AnchoredCollate(owner, table)
        self.loss: float | None = None
        self._passes, self._folder = passes, folder
        self._round_rows = min(round_rows or len(table.order), len(table.order))
        self._forward = AnchoredForward(
            owner, passes.emulator, table, passes.places, passes.stored_as
        )
        self._temporary: TemporaryDirectory[str] | None = None
        self._start_round(0)

    @property
    def is_round_over(self) -> bool:
        """Whether the loop has drawn all rows of the round, so that `renew` is due."""
        return self._forward.is_window_drawn

    def renew(self) -> None:
        """Begin the next round: run the original over its rows, with the adapter as it is now.

        The round behind the last row begins with the first row again, as the next epoch does.

        Raises:
            ConfigError: the anchors are closed, the adapter is no plain LoRA or is not finite, or
                the disk is too small for the offsets.
        """
        if self.collate.is_closed:
            raise ConfigError("these anchors are closed; call emloc.anchor again")
        first = self._window.stop
        self._start_round(0 if first == len(self._passes.table.order) else first)

    def close(self) -> None:
        """Remove the hooks from the emulator, and a temporary folder of offsets."""
        self.collate.is_closed = True
        self._forward.close()
        self._remove_temporary()

    def __enter__(self) -> Anchors:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_round(self, first: int) -> None:
        """Record the offsets of the round that begins at a row, and attach them to the emulator."""
        self._forward.detach()
        self._remove_temporary()
        count = len(self._passes.table.order)
        self._window = range(first, min(first + self._round_rows, count))
        try:
            folder, self.loss = self._passes.record(self._parent(), self._window)
        except BaseException:
            self.close()
            raise
        self._forward.attach(folder, self._window)

    def _parent(self) -> Path:
        """Return the folder of all passes; processes that train together have one each."""
        if self._folder is None:
            self._temporary = TemporaryDirectory(prefix="emloc-anchors-")
            return Path(self._temporary.name)
        return self._folder / f"process-{rank()}" if world_size() > 1 else self._folder

    def _remove_temporary(self) -> None:
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None
