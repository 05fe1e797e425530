"""Run a model block by block over many batches, with one block's weights in memory at a time.

The model's own `forward` does the computation. The forward pass of each batch runs in a coroutine
that suspends where the pass enters a block. Once all passes have reached the block, its weights are
loaded, each pass runs through the block in turn, and the weights are dropped. A thread reads the
next block from disk meanwhile. Masks, position tables and other arguments of a block are therefore
right for any architecture: the model computes them.

The tensors of suspended passes stay on the device up to a limit. Beyond it they are offloaded to
host memory and, beyond a second limit, to disk. Those that only the code around the loop over the
blocks refers to, such as the pixels of an image, come back when the loop has ended. So the device
holds one block, one pass and what the limit allows, whatever the size of the model and the number
of batches. Host memory holds the weights of at most one block.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn
from transformers import PreTrainedModel

from emloc.calibration.block_order import next_block, ordered_blocks
from emloc.calibration.offload import (
    UNLIMITED,
    OffloadedTensors,
    OffloadPool,
    StateLimits,
    tensors_in,
)
from emloc.calibration.padding import TokenMask, other_sequences, read_mask
from emloc.calibration.read_ahead import ReadAhead, WeightReader
from emloc.errors import ConfigError
from emloc.models.block_names import find_block
from emloc.models.checkpoint.source import Source
from emloc.models.decoder import decoder_of
from emloc.runtime.work_meter import count_operations
from emloc.tensors.lean.embedding import HostEmbedding
from emloc.tensors.lean.model import separate_embedding
from emloc.tensors.nn.forward import accepts_use_cache
from emloc.tensors.nn.operations import linear_operations

Batch = Mapping[str, Any]
# Called after each batch with the mask of the batch's real tokens. The mask is None for blocks that
# do not process tokens, such as those of a vision tower.
AfterBatch = Callable[[TokenMask | None], None]
# Runs one batch through the model; called inside the coroutine with the batch on the device.
Call = Callable[[dict[str, Any]], object]


def block_of(name: str) -> str:
    """Name of the transformer block that contains the module `name`.

    The block's name ends with the first number: `model.layers.3.mlp.up_proj` lies in
    `model.layers.3`.

    Raises:
        ConfigError: the name has no number.
    """
    block = find_block(name)
    if block is None:
        raise ConfigError(
            f"{name} lies in no numbered block, and only layers of blocks are compressed; "
            "set model.emulator_targets (targets in emloc.build_emulator) to layers of blocks"
        )
    return block


def by_block(names: Iterable[str]) -> dict[str, list[str]]:
    """Group module names by block: block name -> names of its modules, in the order of `names`."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(block_of(name), []).append(name)
    return groups


def iterate_checkpoint(
    source: Source,
    batches: Sequence[Batch],
    blocks: Sequence[str],
    device: torch.device,
    *,
    limits: StateLimits = UNLIMITED,
    folder: Path | None = None,
) -> Iterator[Block]:
    """Run a checkpoint block by block; only the weights outside the blocks stay in memory.

    See `iterate_blocks` for the arguments and errors. The output head is never read.
    """
    model = source.skeleton()
    source.require(_names_without_head(model, source))
    fill_outside(model, source, blocks, device)
    return iterate_blocks(model, batches, blocks, device, source, limits=limits, folder=folder)


def fill_outside(
    model: PreTrainedModel,
    weights: WeightReader,
    blocks: Iterable[str],
    device: torch.device,
    *,
    with_head: bool = False,
    without: Collection[str] = (),
) -> None:
    """Read all weights that are neither in one of the blocks nor in the output head.

    The token embedding stays in host memory: blocks do not read it, and it is larger than a block
    of many models. With `with_head` the passes reach the head, and an embedding that is tied to it
    goes to the device. The parameters `without` are not read.
    """
    inside = tuple(f"{name}." for name in blocks)
    names = [name for name in _names_without_head(model, weights) if name not in without]
    names = [name for name in names if not name.startswith(inside)]
    if not (with_head and model.all_tied_weights_keys):
        name = _read_embedding(model, weights, device)
        names = [other for other in names if other != name]
    weights.fill(model, names, device)


def _read_embedding(
    model: PreTrainedModel, weights: WeightReader, device: torch.device
) -> str | None:
    """Read the token embedding to host memory and return its name; None if it cannot stay there."""
    embedding = separate_embedding(model)
    if embedding is None:
        return None
    [name] = [name for name, weight in model.named_parameters() if weight is embedding.weight]
    weights.fill(model, [name], torch.device("cpu"))
    filled = model.get_submodule(name.removesuffix(".weight"))
    model.set_input_embeddings(HostEmbedding(filled.weight, device))
    return name


def _names_without_head(model: PreTrainedModel, weights: WeightReader) -> list[str]:
    """Names of all parameters but those of the output head, and of the buffers to read."""
    head = model.get_output_embeddings()
    unread_ids = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    names = [name for name, weight in model.named_parameters() if id(weight) not in unread_ids]
    return names + weights.buffers


def iterate_blocks(
    model: nn.Module,
    batches: Iterable[Batch],
    blocks: Sequence[str],
    device: torch.device,
    source: WeightReader | None = None,
    *,
    limits: StateLimits = UNLIMITED,
    folder: Path | None = None,
    calls: Iterable[Call] | None = None,
    end: Callable[[], None] | None = None,
) -> Generator[Block, None, None]:
    """Yield the blocks in the order of computation; all batches wait at the entry of each block.

    The forward passes end after the last block: final norm and output head are not computed, unless
    there is an `end`.

    Args:
        model: with all weights, or with its blocks on the meta device if `source` has the weights.
        batches: keyword arguments of the model's forward; tensors are moved to `device`. An
            iterator is read while the passes begin.
        blocks: names of the blocks in any order, as a sorted list may put layer 10 before layer 2.
        device: device that the model runs on.
        source: checkpoint to read each block's weights from; None if the model has the weights.
        limits: memory for the tensors of suspended passes; beyond it they go to disk.
        folder: folder for the tensors on disk; None for the system's temporary folder.
        calls: one function for each batch, which calls the model; None: the model's forward.
        end: called behind the last block, whose weights the device no longer holds. The passes then
            go on to their own end; the model must have the weights that they need.

    Raises:
        ValueError: a name in `blocks` is no module of the model.
        ConfigError: the disk is full, or a batch has no token beside its padding.
    """
    caller = getcurrent()

    def suspend_at(name: str) -> Callable[..., None]:
        """A forward pre-hook that suspends the forward pass at the entry of the block `name`."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # `SuspendedForward.peek` calls the block from the caller's own coroutine.
            if getcurrent() is not caller:
                caller.switch(_Suspension(name, module, args, kwargs))

        return hook

    def suspend_behind(module: nn.Module, *_: Any) -> None:
        """Suspend the forward pass behind the last block."""
        if getcurrent() is not caller:
            caller.switch(_Suspension(None, module, (), {}))

    def exit_forward(*_: Any) -> None:
        """End the forward pass after the last block: the final norm and the head are not needed."""
        if getcurrent() is not caller:
            raise GreenletExit

    requested_names = set(blocks)
    modules = {name: module for name, module in model.named_modules() if name in requested_names}
    if missing := requested_names - modules.keys():
        raise ValueError(f"the model has no block {min(missing)}")
    decoder = decoder_of(model) if isinstance(model, PreTrainedModel) else model
    modules = ordered_blocks(modules, decoder)
    handles = [
        module.register_forward_pre_hook(suspend_at(name), with_kwargs=True)
        for name, module in modules.items()
    ]
    if end is None:
        handles.append(list(modules.values())[-1].register_forward_hook(exit_forward))
    pool = OffloadPool(model, device, limits, folder)
    decoder_ids = {id(module) for module in decoder.modules()}
    forwards: list[SuspendedForward] = []
    remaining = list(modules)
    reader = ReadAhead(source, model, device) if source is not None else None
    try:
        if reader is not None:
            reader.start(remaining)
        # One at a time, so that an iterator of batches has one batch in memory.
        for batch, call in _with_calls(batches, calls):
            forwards.append(SuspendedForward(model, batch, pool, call))
            forwards[-1].advance()
            forwards[-1].offload()
        while remaining:
            name = next_block(remaining, {forward.block_name for forward in forwards})
            remaining.remove(name)
            module = modules[name]
            if end is not None and not remaining:
                handles.append(module.register_forward_hook(suspend_behind))
            if reader is not None:
                reader.fill(name)
                reader.start(remaining)
            # A batch without images never enters the blocks of a vision tower.
            at_block = [forward for forward in forwards if forward.block_name == name]
            block = Block(name, module, at_block, has_mask=id(module) in decoder_ids)
            yield block
            block.run(lambda _: None)  # does nothing if the caller has run the block
            if reader is not None:
                module.to("meta")
        if end is not None:
            end()
            for forward in forwards:
                forward.finish()
    finally:
        if reader is not None:
            reader.close()
        for forward in forwards:
            forward.close()
        pool.close()
        for handle in handles:
            handle.remove()


class _Suspension(NamedTuple):
    """Where a forward pass is suspended."""

    block_name: str | None  # None: behind the last block
    block: nn.Module
    args: tuple[Any, ...]  # of the block
    kwargs: dict[str, Any]


class Block:
    """One transformer block with its weights loaded, and the forward passes suspended at its entry.

    `has_mask`: whether the attention masks of the batches describe the block's inputs. They do in
    the decoder. The blocks of a vision tower process image patches, whose number may by chance
    equal the number of tokens.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        forwards: list[SuspendedForward],
        *,
        has_mask: bool = True,
    ) -> None:
        self.name = name
        self.module = module
        self._forwards = forwards
        self._has_mask = has_mask

    def peek(self, after_batch: AfterBatch) -> None:
        """Run the block on every batch, discard its outputs and stay at its entry."""
        for mask in self.peek_batches():
            after_batch(mask)

    def peek_batches(self) -> Iterator[TokenMask | None]:
        """Run the block on one batch after the other, discard its outputs and yield each mask.

        A caller can alternate between the blocks of two models, so that both process the same
        batch before either proceeds to the next.
        """
        for forward in self._forwards:
            forward.peek(self.module)
            self._count(forward)
            yield forward.token_mask() if self._has_mask else None
            forward.offload()

    def run(self, after_batch: AfterBatch) -> None:
        """Advance every batch through this block to the next one; a second call does nothing."""
        forwards, self._forwards = self._forwards, []
        stays_in_loop = False  # as the first pass did, which shows what the model does here
        for forward in forwards:
            # Before the pass proceeds, since it forgets the inputs of this block then.
            mask = forward.token_mask() if self._has_mask else None
            stays_in_loop = forward.advance(stays_in_loop=stays_in_loop)
            self._count(forward)
            # Before the offload, so that `after_batch` reads tensors on the device.
            after_batch(mask)
            forward.offload()

    def _count(self, forward: SuspendedForward) -> None:
        """Count the arithmetic of one batch in this block, if it is a block of the decoder."""
        if self._has_mask:
            count_operations(forward.rows * linear_operations(self.module))


class SuspendedForward:
    """The forward pass of one batch, suspended at the entry of the block `block_name`."""

    def __init__(
        self, model: nn.Module, batch: Batch, pool: OffloadPool, call: Call | None = None
    ) -> None:
        self._is_real: Tensor | None = None  # (batch, length), false for padding
        self.block_name: str | None = None
        self._block_inputs: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._model = model
        self._call = call
        self._batch = batch
        self._pool = pool
        self._offloaded = OffloadedTensors(pool)
        self._coroutine = greenlet(self._forward)
        self._frames = _Frames((), ())
        self.rows = rows_of(batch)

    def _forward(self) -> None:
        """Run the model's forward on the batch; runs inside the coroutine."""
        # The caller owns the tensors of the batch: as local variables they would be offloaded.
        inputs = {
            key: _detach_to(value, self._pool.device) if isinstance(value, Tensor) else value
            for key, value in self._batch.items()
        }
        if accepts_use_cache(self._model):
            inputs["use_cache"] = False  # or the keys and values of all blocks would stay in memory
        if inputs.get("attention_mask") is not None:
            # A copy, since a mask that a frame has, too, may be off the device.
            self._is_real = read_mask(inputs["attention_mask"]).clone()
        self._batch = {}  # the inputs are in the frames of the pass from now on
        if self._call is None:
            self._model(**inputs)
        else:
            self._call(inputs)

    def advance(self, *, stays_in_loop: bool = False) -> bool:
        """Resume the forward pass up to the entry of the next block, or to the end.

        Args:
            stays_in_loop: the code that runs until then is that of the loop over the blocks, and
                what it calls. Tensors of the frames outside stay off the device.

        Returns:
            Whether the pass has stayed in the loop.

        Raises:
            RuntimeError: the pass has left the loop, although it should not.
        """
        self._offloaded.restore(outer=not stays_in_loop)
        self._block_inputs = ((), {})
        loop, self._frames = self._frames.loop, _Frames((), ())
        with torch.no_grad():
            suspension = self._coroutine.switch()
        block, self.block_name = self.block_name, None
        if isinstance(suspension, _Suspension):
            self.block_name = suspension.block_name
            self._block_inputs = suspension.args, suspension.kwargs
            self._frames = _Frames.of(self._coroutine, suspension.block)
        stayed = loop is not None and self._frames.loop is loop
        if stays_in_loop and not stayed:
            raise RuntimeError(f"the forward pass of a batch takes another way behind {block}")
        return stayed

    def finish(self) -> None:
        """Resume the forward pass behind the last block, unless it has ended."""
        if not self._coroutine.dead:
            self.advance()
            self._offloaded.release()

    def token_mask(self) -> TokenMask | None:
        """The mask of the real tokens at this block; None if the batch has no attention mask."""
        if self._is_real is None:
            return None
        return TokenMask(self._is_real, other_sequences(self._block_inputs[1]))

    def peek(self, block: nn.Module) -> None:
        """Run `block`, at which the pass is suspended, and discard the output."""
        self._offloaded.restore(outer=False)
        args, kwargs = self._block_inputs
        with torch.no_grad():
            block(*args, **kwargs)

    def offload(self) -> None:
        """Offload the tensors that the suspended forward pass holds."""
        if not self._pool.is_idle:
            self._offloaded.offload(self._frames.inner, self._frames.outer)

    def close(self) -> None:
        """Abort the forward pass and release its tensors."""
        if not self._coroutine.dead:
            self._coroutine.throw(GreenletExit)
        self._block_inputs, self._frames = ((), {}), _Frames((), ())
        self._offloaded.release()


def _with_calls(
    batches: Iterable[Batch], calls: Iterable[Call] | None
) -> Iterator[tuple[Batch, Call | None]]:
    """Yield each batch with the function that runs it; None for the model's forward."""
    if calls is None:
        yield from ((batch, None) for batch in batches)
    else:
        yield from zip(batches, calls, strict=True)


def rows_of(batch: Batch) -> int:
    """Number of rows in a batch. Images may be more than rows, so token ids are counted first."""
    tensors = [batch.get("input_ids"), *batch.values()]
    return len(next(tensor for tensor in tensors if isinstance(tensor, Tensor)))


def _detach_to(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`, as a new tensor object, since offloading changes objects in place."""
    return tensor.to(device).detach()


@dataclass(frozen=True)
class _Frames:
    """The stack frames of a suspended pass, up to the loop over the blocks, and outside of it."""

    inside: tuple[FrameType, ...]
    outside: tuple[FrameType, ...]

    @classmethod
    def of(cls, coroutine: greenlet, block: nn.Module) -> _Frames:
        """Return the frames of a pass that is suspended at the entry of `block`."""
        frames = []
        frame = coroutine.gr_frame
        while frame is not None:
            frames.append(frame)
            frame = frame.f_back
        calls = [i for i, frame in enumerate(frames) if frame.f_locals.get("self") is block]
        end = calls[-1] + 2 if calls else len(frames)
        return cls(tuple(frames[:end]), tuple(frames[end:]))

    @property
    def loop(self) -> FrameType | None:
        """The frame that calls the block; None if there is none outside."""
        return self.inside[-1] if self.outside else None

    @property
    def inner(self) -> Iterator[Tensor]:
        """The tensors that the frames up to the loop refer to."""
        return tensors_in([frame.f_locals for frame in self.inside])

    @property
    def outer(self) -> Iterator[Tensor]:
        """The tensors that the frames outside of the loop refer to."""
        return tensors_in([frame.f_locals for frame in self.outside])
