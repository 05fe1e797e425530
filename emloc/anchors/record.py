"""Record offsets: run the original and the emulator over the same rows, block by block.

For every place p, H_p are the original's hidden states, and e_p is the emulator's stretch of blocks
between the places p-1 and p. The offset is c_p = H_p - e_p(h_{p-1}), where h_{p-1} is what training
will have at the place before: the emulator's hidden states with the rounded offset. Rounding
therefore does not add up from place to place.

The device holds one block of the original, the emulator, and one batch. A pass that was killed goes
on behind the last place that it has marked as finished.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from emloc.anchors.batch_plan import BatchPlan, batch_plan
from emloc.anchors.batches import KeyedRow
from emloc.anchors.formats import OffsetFormat
from emloc.anchors.places import Place
from emloc.anchors.recorder import OffsetRecorder
from emloc.calibration.blockwise import Block, fill_outside, iterate_blocks
from emloc.calibration.offload import UNLIMITED, StateLimits
from emloc.calibration.read_ahead import WeightReader
from emloc.models.objectives import Objective
from emloc.models.objectives.answer_logits import forward_logits
from emloc.runtime.atomic import write_json
from emloc.runtime.progress import tracked
from emloc.tensors.nn.surgery import replace_tensor

LOSSES_FILE = "losses.json"
# Most bytes of batches in host memory that one model has begun with and the other has not.
MOST_COLLATED = 2**29

# Sum of a row's losses and the number of its items, such as answer tokens.
RowLoss = tuple[float, int]


@dataclass(frozen=True)
class Original:
    """The original model with the reference adapter on it, if there is one."""

    model: PreTrainedModel
    weights: WeightReader | None  # reads the weights of `model`; None: the model has them


@dataclass(frozen=True)
class Stretches:
    """The emulator with the reference adapter, on the device, and the offsets to record for it."""

    model: PreTrainedModel
    places: Sequence[Place]
    stored_as: OffsetFormat
    # Returns the context that the emulator is trained in, such as autocast.
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    # Whether the output head is the original's, so that one copy on the device does for both.
    has_head_of_original: bool = False

    @property
    def token_bytes(self) -> int:
        """Bytes of the offset of one token at one place."""
        return self.stored_as.token_bytes(self.model.config.get_text_config().hidden_size)


@dataclass(frozen=True)
class Rows:
    """The rows of a pass, how they become batches, and how their losses are measured."""

    anchored: Sequence[KeyedRow]  # rows that get offsets
    measured: Sequence[KeyedRow]  # rows of which only the original's loss is measured
    collate: Callable[[list[Any]], dict[str, Any]]
    objective: Objective
    batch_tokens: int  # tokens of one batch, padding included


def record(
    folder: Path,
    original: Original,
    stretches: Stretches | None,
    rows: Rows,
    blocks: Sequence[str],
    decoder_blocks: Sequence[str],
    *,
    device: torch.device,
    limits: StateLimits = UNLIMITED,
) -> dict[str, RowLoss]:
    """Write the offsets of all rows into `folder`, and return the original's loss on each row.

    Args:
        folder: of the offsets; states of a killed pass are in it.
        original: the original model.
        stretches: the emulator; None: only the losses are measured.
        rows: the rows and their reader.
        blocks: names of all blocks of the model.
        decoder_blocks: those that process tokens, in order; a killed pass skips finished ones.
        device: where both models run.
        limits: memory for the hidden states of both models together.

    Raises:
        ConfigError: the disk is full, or the hidden states have another shape than the tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    losses = folder / LOSSES_FILE
    if not losses.exists():
        plan = batch_plan(
            folder,
            rows.anchored,
            rows.measured,
            batch_tokens=rows.batch_tokens,
            token_bytes=stretches.token_bytes if stretches is not None else None,
        )
        recording = _Pass(folder, original, stretches, rows, plan, list(decoder_blocks), device)
        recording.run(blocks, limits)
        write_json(losses, recording.losses)
        recording.recorder.states.remove()
    return {row: (total, items) for row, (total, items) in json.loads(losses.read_text()).items()}


# The blocks of a model, one after the other.
Blocks = Generator[Block, None, None]


@dataclass
class _Pass:
    """One pass over all batches; see `record`."""

    folder: Path
    original: Original
    stretches: Stretches | None
    rows: Rows
    plan: BatchPlan
    decoder_blocks: list[str]
    device: torch.device
    losses: dict[str, RowLoss] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._all_rows = [*self.rows.anchored, *self.rows.measured]
        keys = [row.key for row in self._all_rows]
        self.recorder = OffsetRecorder(self.folder, self._places, self.plan, keys)
        self._collated: dict[int, dict[str, Any]] = {}
        self._collated_bytes = 0

    @property
    def _places(self) -> Sequence[Place]:
        return self.stretches.places if self.stretches is not None else ()

    @property
    def _anchored_batches(self) -> int:
        return sum(len(shard) for shard in self.plan.shards)

    def run(self, blocks: Sequence[str], limits: StateLimits) -> None:
        """Run both models over all batches."""
        done = self._finished_places()
        states = self.recorder.states.folder
        with ExitStack() as stack:
            stack.enter_context(self.recorder.writer)
            skipped = self._skip(stack, done)
            remaining = [name for name in blocks if name not in skipped]
            if self.stretches is not None:
                models = (self.original.model, self.stretches.model)
                self.recorder.attach(stack, *models, self.stretches.stored_as, done)
            if self.decoder_blocks:
                first = self.original.model.get_submodule(self.decoder_blocks[0])
                stack.callback(first.register_forward_hook(self._note_output).remove)
            # Closed here, since coroutines that the garbage collector ends later would end inside
            # the coroutine that runs then.
            originals = stack.enter_context(closing(self._originals(remaining, limits, states)))
            count = len(remaining)
            if self.stretches is None or done == len(self._places):
                for block in tracked(originals, "measure", count, "block"):
                    block.run(lambda _: None)
                return
            emulators = stack.enter_context(closing(self._emulators(remaining, limits, states)))
            for original in tracked(originals, "anchor", count, "block"):
                original.run(lambda _: None)
                with self.stretches.context():
                    next(emulators).run(lambda _: None)
                self.recorder.finish_place_behind(original.name)
            next(emulators, None)  # ends the passes

    def _originals(self, blocks: Sequence[str], limits: StateLimits, states: Path) -> Blocks:
        """Yield the blocks of the original, which computes the losses after the last of them."""
        model, weights = self.original.model, self.original.weights
        # Without a block of the decoder, the passes reach the head before any block is run.
        reaches_head = not {*blocks} & {*self.decoder_blocks}
        if weights is not None:
            inside = {*blocks, *self.decoder_blocks}
            fill_outside(
                *(model, weights, inside, self.device),
                with_head=True,
                without=self._shared_embedding(),
            )
            model.tie_weights()
            if reaches_head:
                self._fill_head()
        model.eval()
        indices = range(len(self.plan.batches))
        return iterate_blocks(
            model,
            (self._collate(index) for index in indices),
            blocks,
            self.device,
            weights,
            limits=limits.halved,
            folder=states,
            calls=[self._measuring(index) for index in indices],
            end=_go_on if reaches_head else self._fill_head,
        )

    def _emulators(self, blocks: Sequence[str], limits: StateLimits, states: Path) -> Blocks:
        """Yield the blocks of the emulator."""
        assert self.stretches is not None
        model = self.stretches.model
        indices = range(self._anchored_batches)
        model.eval()

        def call(index: int) -> Callable[[dict[str, Any]], None]:
            def run(inputs: dict[str, Any]) -> None:
                self.recorder.begin(index)
                # A place in front of the head is reached without the logits of all tokens.
                forward_logits(model, inputs)

            return run

        return iterate_blocks(
            model,
            (self._collate(index) for index in indices),
            blocks,
            self.device,
            limits=limits.halved,
            folder=states,
            calls=[call(index) for index in indices],
            end=_go_on if any(place.predicting_only for place in self._places) else None,
        )

    def _collate(self, index: int) -> dict[str, Any]:
        """Return a batch, and remember which of its positions have offsets.

        The original's batches are kept for the emulator: to read images may take as long as a pass.
        """
        if index in self._collated:
            return self._collated.pop(index)
        batch = self.rows.collate([self._all_rows[row].row for row in self.plan.batches[index]])
        self.recorder.note_batch(index, batch)
        nbytes = sum(value.nbytes for value in batch.values() if isinstance(value, Tensor))
        if index < self._anchored_batches and self._collated_bytes + nbytes <= MOST_COLLATED:
            self._collated[index] = batch
            self._collated_bytes += nbytes
        return batch

    def _measuring(self, index: int) -> Callable[[dict[str, Any]], None]:
        """Return the function that runs the original on a batch and keeps its rows' losses."""

        def run(inputs: dict[str, Any]) -> None:
            self.recorder.begin(index)
            rows = [self._all_rows[row] for row in self.plan.batches[index]]
            measured = self.rows.objective.row_losses(
                self.original.model, [keyed.row for keyed in rows], inputs
            )
            self.losses |= {k.key: loss for k, loss in zip(rows, measured, strict=True)}

        return run

    def _shared_embedding(self) -> list[str]:
        """Let the original have the emulator's token embedding, if the head is tied to it.

        Returns the names of the parameters that it has then.
        """
        model = self.original.model
        if self.stretches is None or not self.stretches.has_head_of_original:
            return []
        if not model.all_tied_weights_keys:
            return []
        embedding = {id(p) for p in model.get_input_embeddings().parameters()}
        names = [name for name, p in model.named_parameters() if id(p) in embedding]
        missing = _share_parameters(self.stretches.model, model, names)
        return [name for name in names if name not in missing]

    def _fill_head(self) -> None:
        """Read the head of the original, or use that of the emulator if it is the same."""
        model, weights = self.original.model, self.original.weights
        if weights is None:
            return
        names = _own_head_parameters(model)
        if self.stretches is not None and self.stretches.has_head_of_original:
            names = _share_parameters(self.stretches.model, model, names)
        weights.fill(model, names, self.device)

    # A killed pass.

    def _finished_places(self) -> int:
        """Return the number of places that an earlier attempt has finished."""
        if getattr(self.original.model.config.get_text_config(), "num_kv_shared_layers", 0):
            return 0  # later blocks read keys and values of skipped ones
        return self.recorder.states.finished_places(len(self.plan.shards))

    def _skip(self, stack: ExitStack, done: int) -> list[str]:
        """Replace finished blocks by the hidden states behind them; return the blocks' names."""
        if not done:
            return []
        last = self.decoder_blocks.index(self._places[done - 1].module)
        names = self.decoder_blocks[: last + 1]
        models: dict[str, nn.Module] = {"original": self.original.model}
        if self.stretches is not None:
            models["emulator"] = self.stretches.model
        self.recorder.skip(stack, models, names, done - 1)
        return names

    def _note_output(self, _: nn.Module, __: Any, output: Any) -> None:
        """Remember what a block returns, for those that replace it when the pass is resumed."""
        self.recorder.states.tuple_size = len(output) if isinstance(output, tuple) else 0


def _go_on() -> None:
    """Do nothing behind the last block: the model has all that the passes need."""


def _share_parameters(
    owner: PreTrainedModel, model: PreTrainedModel, names: Sequence[str]
) -> list[str]:
    """Let a model have parameters of another one; return the names of those that it has not got.

    It does not get any that are trained, or stored in another way.
    """
    own = dict(owner.named_parameters())
    missing = []
    for name in names:
        tensor, target = own.get(name), model.get_parameter(name)
        if tensor is not None and _is_frozen_twin(tensor, target):
            replace_tensor(model, name, tensor.detach())
        else:
            missing.append(name)
    return missing


def _is_frozen_twin(tensor: nn.Parameter, target: nn.Parameter) -> bool:
    """Return whether a parameter is not trained, and has the shape and dtype of another one."""
    is_alike = (tensor.shape, tensor.dtype) == (target.shape, target.dtype)
    return is_alike and not tensor.requires_grad


def _own_head_parameters(model: PreTrainedModel) -> list[str]:
    """Names of the parameters of the output head that the token embedding does not share."""
    head = model.get_output_embeddings()
    if head is None:
        return []
    shared: Mapping[int, nn.Parameter] = {
        id(p): p for p in model.get_input_embeddings().parameters()
    }
    unshared = {id(p) for p in head.parameters() if id(p) not in shared}
    return [name for name, p in model.named_parameters() if id(p) in unshared]
