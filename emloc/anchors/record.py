"""Record offsets: run the original and the emulator over the same rows, block by block.

For every place p, H_p are the original's hidden states, and e_p is the emulator's stretch of blocks
between the places p-1 and p. The offset is c_p = H_p - e_p(h_{p-1}), where h_{p-1} is what training
will have at the place before: the emulator's hidden states with the rounded offset. Rounding
therefore does not add up from place to place.

The device holds one block of the original, the emulator, and one batch. A pass that was killed goes
on behind the last block place that it has finished.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from greenlet import getcurrent
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from emloc.anchors.attached import put_back
from emloc.anchors.batches import KeyedRow
from emloc.anchors.formats import OffsetFormat, Parts
from emloc.anchors.places import Place
from emloc.anchors.shards import shard_file, write_rows, write_shard
from emloc.calibration.blockwise import Block, WeightReader, fill_outside, iterate_blocks
from emloc.errors import ConfigError
from emloc.models.objectives import Objective
from emloc.runtime.atomic import write_json
from emloc.runtime.manifest import file_hash
from emloc.runtime.progress import tracked
from emloc.runtime.safetensors_file import write_safetensors

log = logging.getLogger(__name__)

LOSSES_FILE = "losses.json"
# Bytes of offsets at one place in one file, about.
SHARD_BYTES = 128 * 2**20

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
    host_bytes: int | None = None,
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
        host_bytes: limit of host memory for hidden states; the rest goes to disk.

    Raises:
        ConfigError: the disk is full, or the hidden states have another shape than the tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    losses = folder / LOSSES_FILE
    if not losses.exists():
        plan = _plan(folder, rows, stretches)
        recording = _Pass(folder, original, stretches, rows, plan, list(decoder_blocks), device)
        recording.run(blocks, host_bytes)
        write_json(losses, recording.losses)
        shutil.rmtree(folder / _STATES, ignore_errors=True)
    return {row: (total, items) for row, (total, items) in json.loads(losses.read_text()).items()}


_STATES = "states"
# The blocks of a model, one after the other.
Blocks = Generator[Block, None, None]


@dataclass(frozen=True)
class _Plan:
    """Batches of row indices: those with offsets come first, and each shard is some of them."""

    batches: list[list[int]]
    shards: list[list[int]]  # indices of batches


def _plan(folder: Path, rows: Rows, stretches: Stretches | None) -> _Plan:
    """Return the batches and shards of a pass, as an interrupted attempt has begun with them."""
    path = folder / "plan.json"
    if not path.exists():
        anchored = _batches(rows.anchored, rows.batch_tokens)
        offset = len(rows.anchored)
        measured = [
            [offset + index for index in batch]
            for batch in _batches(rows.measured, rows.batch_tokens)
        ]
        shards: list[list[int]] = []
        if stretches is not None:
            width = stretches.model.config.get_text_config().hidden_size
            token_bytes = stretches.stored_as.token_bytes(width)
            sizes = [
                sum(rows.anchored[index].length for index in batch) * token_bytes
                for batch in anchored
            ]
            for index, end in enumerate(accumulate(sizes)):
                shard = (end - sizes[index]) // SHARD_BYTES
                if shard >= len(shards):
                    shards.append([])
                shards[-1].append(index)
        keys = [[rows.anchored[i].key for b in shard for i in anchored[b]] for shard in shards]
        write_rows(folder, keys)
        write_json(path, {"batches": anchored + measured, "shards": shards})
    return _Plan(**json.loads(path.read_text()))


def _batches(rows: Sequence[KeyedRow], tokens: int) -> list[list[int]]:
    """Return indices of rows in batches of similar lengths, each of at most `tokens` or one row."""
    batches: list[list[int]] = []
    for index in sorted(range(len(rows)), key=lambda index: rows[index].length):
        # In this order the newest row is the longest of its batch.
        if batches and rows[index].length * (len(batches[-1]) + 1) <= tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


@dataclass
class _Pass:
    """One pass over all batches; see `record`."""

    folder: Path
    original: Original
    stretches: Stretches | None
    rows: Rows
    plan: _Plan
    decoder_blocks: list[str]
    device: torch.device
    losses: dict[str, RowLoss] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._all_rows = [*self.rows.anchored, *self.rows.measured]
        # Coroutine of a forward pass -> index of its batch.
        self._batch_index: dict[object, int] = {}
        self._masks: dict[int, list[Tensor]] = {}  # batch -> mask of each place
        self._tuple_size = 0  # of a block's output; 0: it is a tensor
        self._open_shard: dict[str, Parts] = {}

    @property
    def _places(self) -> Sequence[Place]:
        return self.stretches.places if self.stretches is not None else ()

    @property
    def _anchored_batches(self) -> int:
        return sum(len(shard) for shard in self.plan.shards)

    def run(self, blocks: Sequence[str], host_bytes: int | None) -> None:
        """Run both models over all batches."""
        done = self._finished_places()
        limit = None if host_bytes is None else host_bytes // 2
        states = self.folder / _STATES
        states.mkdir(exist_ok=True)
        with ExitStack() as stack:
            skipped = self._skip(stack, done)
            remaining = [name for name in blocks if name not in skipped]
            self._attach(stack, done)
            # Closed here, since coroutines that the garbage collector ends later would end inside
            # the coroutine that runs then.
            originals = stack.enter_context(closing(self._originals(remaining, limit, states)))
            count = len(remaining)
            if self.stretches is None or done == len(self._places):
                for block in tracked(originals, "measure", count, "block"):
                    self._run_original(block, remaining)
                return
            emulators = stack.enter_context(closing(self._emulators(remaining, limit, states)))
            for original in tracked(originals, "anchor", count, "block"):
                self._run_original(original, remaining)
                with self.stretches.context():
                    next(emulators).run(lambda _: None)
                self._finish_places_of(original.name)
            next(emulators, None)  # ends the passes

    def _originals(self, blocks: Sequence[str], limit: int | None, states: Path) -> Blocks:
        """Yield the blocks of the original, which computes the losses after the last of them."""
        model, weights = self.original.model, self.original.weights
        if weights is not None:
            fill_outside(model, weights, {*blocks, *self.decoder_blocks}, self.device)
            model.tie_weights()
            # Without a block of the decoder, the passes reach the head before any block is run.
            if not {*blocks} & {*self.decoder_blocks}:
                weights.fill(model, _own_head_parameters(model), self.device)
        model.eval()
        indices = range(len(self.plan.batches))
        return iterate_blocks(
            model,
            (self._collate(index) for index in indices),
            blocks,
            self.device,
            weights,
            host_bytes=limit,
            folder=states,
            calls=[self._measuring(index) for index in indices],
            to_end=True,
        )

    def _emulators(self, blocks: Sequence[str], limit: int | None, states: Path) -> Blocks:
        """Yield the blocks of the emulator."""
        assert self.stretches is not None
        model = self.stretches.model
        indices = range(self._anchored_batches)
        model.eval()

        def call(index: int) -> Callable[[dict[str, Any]], None]:
            def run(inputs: dict[str, Any]) -> None:
                self._batch_index[getcurrent()] = index
                model(**{name: value for name, value in inputs.items() if name != "labels"})

            return run

        return iterate_blocks(
            model,
            (self._collate(index) for index in indices),
            blocks,
            self.device,
            host_bytes=limit,
            folder=states,
            calls=[call(index) for index in indices],
            to_end=any(place.predicting_only for place in self._places),
        )

    def _collate(self, index: int) -> dict[str, Any]:
        """Return a batch, and remember which of its positions have offsets."""
        batch = self.rows.collate([self._all_rows[row].row for row in self.plan.batches[index]])
        self._masks[index] = [place.tokens(batch) for place in self._places]
        return batch

    def _measuring(self, index: int) -> Callable[[dict[str, Any]], None]:
        """Return the function that runs the original on a batch and keeps its rows' losses."""

        def run(inputs: dict[str, Any]) -> None:
            self._batch_index[getcurrent()] = index
            rows = [self._all_rows[row] for row in self.plan.batches[index]]
            measured = self.rows.objective.row_losses(
                self.original.model, [keyed.row for keyed in rows], inputs
            )
            self.losses |= {k.key: loss for k, loss in zip(rows, measured, strict=True)}

        return run

    def _run_original(self, block: Block, blocks: Sequence[str]) -> None:
        """Run a block of the original; the head is read just before the last one."""
        model, weights = self.original.model, self.original.weights
        if weights is not None and block.name == blocks[-1]:
            weights.fill(model, _own_head_parameters(model), self.device)
        block.run(lambda _: None)

    # Places: what the hooks do with the hidden states.

    def _attach(self, stack: ExitStack, done: int) -> None:
        """Attach the hooks of all places that are not finished."""

        def add(handle: RemovableHandle) -> None:
            stack.callback(handle.remove)

        for index, place in enumerate(self._places):
            if index >= done:
                assert self.stretches is not None
                add(place.attach(self.original.model, self._keeping(index)))
                add(place.attach(self.stretches.model, self._recording(index)))
        if self.decoder_blocks:
            block = self.original.model.get_submodule(self.decoder_blocks[0])
            add(block.register_forward_hook(self._note_output))

    def _note_output(self, _: nn.Module, __: Any, output: Any) -> None:
        self._tuple_size = len(output) if isinstance(output, tuple) else 0

    def _keeping(self, place: int) -> Callable[[Tensor], Tensor]:
        """Return the hook of the original at a place, which writes its hidden states to a file."""

        def keep(hidden: Tensor) -> Tensor:
            index = self._batch_index[getcurrent()]
            self._save_state("original", place, index, self._select(hidden, place, index))
            return hidden

        return keep

    def _recording(self, place: int) -> Callable[[Tensor], Tensor]:
        """Return the hook of the emulator at a place, which records offsets and applies them."""
        assert self.stretches is not None
        stored_as = self.stretches.stored_as

        def recording(hidden: Tensor) -> Tensor:
            index = self._batch_index[getcurrent()]
            own = self._select(hidden, place, index)
            target = self._load_state("original", place, index).to(hidden.device)
            wide = torch.promote_types(hidden.dtype, torch.float32)
            parts = stored_as.encode(target.to(wide) - own.to(wide))
            result = hidden.clone()
            mask = self._masks[index][place].to(hidden.device)
            result[mask] = put_back(own, stored_as.decode(parts, hidden.shape[-1]))
            self._save_state("emulator", place, index, result[mask])
            self._add_to_shard(place, index, parts)
            return result

        return recording

    def _select(self, hidden: Tensor, place: int, batch: int) -> Tensor:
        """Return the hidden states (N, d) of the positions with offsets."""
        mask = self._masks[batch][place]
        if hidden.shape[:2] != mask.shape:
            raise ConfigError(
                f"anchor: the hidden states at {self._places[place].module} have the shape "
                f"{tuple(hidden.shape)}, and not those of a batch of {tuple(mask.shape)} tokens; "
                "set anchor=none"
            )
        return hidden[mask.to(hidden.device)]

    def _add_to_shard(self, place: int, batch: int, parts: Parts) -> None:
        """Add the offsets of a batch to the open shard; write the shard after its last batch."""
        counts = self._masks[batch][place].sum(-1).tolist()
        keys = [self._all_rows[row].key for row in self.plan.batches[batch]]
        pieces = {name: torch.split(part.cpu(), counts) for name, part in parts.items()}
        for number, key in enumerate(keys):
            self._open_shard[key] = {name: piece[number] for name, piece in pieces.items()}
        for shard, batches in enumerate(self.plan.shards):
            if batch == batches[-1]:
                write_shard(shard_file(self.folder, place, shard), self._open_shard)
                self._open_shard = {}

    # States of a killed pass.

    def _state_file(self, model: str, place: int, batch: int) -> Path:
        return self.folder / _STATES / f"{model}-{place:03d}-{batch:05d}.safetensors"

    def _save_state(self, model: str, place: int, batch: int, hidden: Tensor) -> None:
        path = self._state_file(model, place, batch)
        write_safetensors(path, {"hidden": hidden}, {}, durable=False)

    def _load_state(self, model: str, place: int, batch: int) -> Tensor:
        return load_file(self._state_file(model, place, batch))["hidden"]

    def _finish_places_of(self, block: str) -> None:
        """Mark the place behind a block as finished and drop the states of the place before."""
        for index, place in enumerate(self._places):
            if place.module == block and not place.at_input:
                states = self.folder / _STATES
                hashes = {
                    path.name: file_hash(path)
                    for path in states.glob(f"*-{index:03d}-*.safetensors")
                }
                facts = {"tuple_size": self._tuple_size, "hashes": hashes}
                write_json(states / f"finished-{index:03d}.json", facts)
                for path in states.glob("*.safetensors"):
                    if int(path.stem.split("-")[1]) < index:
                        path.unlink()

    def _finished_places(self) -> int:
        """Return the number of places that an earlier attempt has finished."""
        if getattr(self.original.model.config.get_text_config(), "num_kv_shared_layers", 0):
            return 0  # later blocks read keys and values of skipped ones
        states = self.folder / _STATES
        finished = sorted(states.glob("finished-*.json"))
        if not finished:
            return 0
        done = int(finished[-1].stem.split("-")[1]) + 1
        shards = range(len(self.plan.shards))
        facts = json.loads(finished[-1].read_text())
        if any(
            not (states / name).exists() or file_hash(states / name) != content
            for name, content in facts["hashes"].items()
        ) or not all(
            shard_file(self.folder, place, shard).exists()
            for place in range(done)
            for shard in shards
        ):
            log.warning("anchor: a file of the interrupted pass is damaged, so it starts anew")
            shutil.rmtree(states)
            return 0
        self._tuple_size = facts["tuple_size"]
        return done

    def _skip(self, stack: ExitStack, done: int) -> set[str]:
        """Replace finished blocks by the hidden states behind them; return the blocks' names."""
        if not done:
            return set()
        last = self.decoder_blocks.index(self._places[done - 1].module)
        names = self.decoder_blocks[: last + 1]
        models: list[tuple[str, nn.Module]] = [("original", self.original.model)]
        if self.stretches is not None:
            models.append(("emulator", self.stretches.model))
        for kind, model in models:
            for name in names:
                block = model.get_submodule(name)
                stored = (kind, done - 1) if name == names[-1] else None
                block.forward = self._stub(stored)
                stack.callback(block.__dict__.pop, "forward")
        return set(names)

    def _stub(self, stored: tuple[str, int] | None) -> Callable[..., Any]:
        """Return the forward of a finished block: its input, or the stored hidden states."""

        def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
            if stored is not None:
                kind, place = stored
                index = self._batch_index[getcurrent()]
                tokens = self._load_state(kind, place, index).to(hidden_states)
                hidden_states = torch.zeros_like(hidden_states)
                hidden_states[self._masks[index][place].to(tokens.device)] = tokens
            if not self._tuple_size:
                return hidden_states
            return (hidden_states, *[None] * (self._tuple_size - 1))

        return forward


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
