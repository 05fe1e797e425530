"""Run a model block by block over many batches, with one block's weights in memory at a time.

The model's own `forward` does the work. Every batch's forward pass is a coroutine that stops where
it enters a block; once all have arrived there the block's weights are read, the passes go through
it one after the other, and the weights are dropped. So masks, position tables and whatever else a
model hands to its blocks are right for any architecture, and nothing of it is written again here.

While a pass is stopped, its tensors wait in host memory and beyond a limit on disk, so a device
holds one block and one pass, whatever the size of the model and the number of batches.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn
from transformers import PreTrainedModel

from emloc.calibration.offload import OffloadedTensors, OffloadPool, tensors_in
from emloc.models.checkpoint.source import Source
from emloc.models.decoder import decoder_of

Batch = Mapping[str, Any]
# Called behind each batch with its mask (batch, length), true where a token is no padding; None if
# no token is.
After = Callable[[Tensor | None], None]


def block_of(name: str) -> str:
    """The repeated block a module lies in: its name up to the first number in it.

    `model.layers.3.mlp.up_proj` lies in `model.layers.3`.

    Raises:
        ValueError: there is no number in the name.
    """
    match = re.match(r"(.*?\.\d+)(\.|$)", name)
    if match is None:
        raise ValueError(f"{name} lies in no numbered block")
    return match[1]


def by_block(names: Iterable[str]) -> dict[str, list[str]]:
    """Block name -> the given modules in it, both in the given order."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(block_of(name), []).append(name)
    return found


def iterate_checkpoint(
    source: Source,
    batches: Sequence[Batch],
    blocks: Sequence[str],
    device: torch.device,
    *,
    host_bytes: int | None = None,
    folder: Path | None = None,
) -> Iterator[Block]:
    """Walk the checkpoint: only what lies outside the blocks is held throughout.

    Takes what `walk` does, and the checkpoint in place of a model.
    """
    model = source.skeleton()
    head = model.get_output_embeddings()
    unread = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    needed = [name for name, one in model.named_parameters() if id(one) not in unread]
    source.require(needed)
    inside = tuple(f"{name}." for name in blocks)
    source.fill(model, [name for name in needed if not name.startswith(inside)], device)
    return iterate_blocks(
        model, batches, blocks, device, source, host_bytes=host_bytes, folder=folder
    )


def iterate_blocks(
    model: nn.Module,
    batches: Sequence[Batch],
    blocks: Sequence[str],
    device: torch.device,
    source: Source | None = None,
    *,
    host_bytes: int | None = None,
    folder: Path | None = None,
) -> Iterator[Block]:
    """Yield the blocks in the order of the model, each about to be run; behind the last it ends.

    Args:
        model: whole, or with its blocks on the meta device if `source` has their weights.
        batches: keyword arguments for its forward; tensors are moved to `device`.
        blocks: names of the blocks, in whatever order: a file of layers may have 10 before 2.
        device: where the model runs.
        source: where to read a block's weights; None if the model has them.
        host_bytes: what the stopped passes may take of host memory; None for no limit.
        folder: where they take disk beyond that; None for the system's temporary files.

    Raises:
        ValueError: the model has no block of that name.
        ConfigError: the disk is full.
    """
    home = getcurrent()

    def stop_at(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if getcurrent() is not home:  # a block that is looked at is called from here
                home.switch((name, args, kwargs))

        return hook

    def leave(*_: Any) -> None:
        """End the pass behind the last block: norms and the vocabulary are not needed."""
        if getcurrent() is not home:
            raise GreenletExit

    wanted = set(blocks)
    modules = {name: module for name, module in model.named_modules() if name in wanted}
    if missing := wanted - modules.keys():
        raise ValueError(f"the model has no block {min(missing)}")
    handles = [
        module.register_forward_pre_hook(stop_at(name), with_kwargs=True)
        for name, module in modules.items()
    ]
    handles.append(list(modules.values())[-1].register_forward_hook(leave))
    lot = OffloadPool(model, device, host_bytes, folder)
    decoder = decoder_of(model) if isinstance(model, PreTrainedModel) else model
    texts = {id(module) for module in decoder.modules()}
    passes = [SuspendedForward(model, batch, lot) for batch in batches]
    try:
        for one in passes:
            one.step()
            one.park()
        for name, module in modules.items():
            if source is not None:
                source.fill(
                    model, [f"{name}.{leaf}" for leaf, _ in module.named_parameters()], device
                )
            here = [one for one in passes if one.at == name]
            block = Block(name, module, here, masked=id(module) in texts)
            yield block
            block.run(lambda _: None)  # if the caller did not
            if source is not None:
                module.to("meta")
    finally:
        for one in passes:
            one.end()
        for handle in handles:
            handle.remove()


class Block:
    """One block of the model with its weights in place, about to be run.

    `masked`: it takes the tokens that the batches' masks are about, and not the patches of images,
    which may by chance be as many.
    """

    def __init__(
        self, name: str, module: nn.Module, passes: list[SuspendedForward], *, masked: bool = True
    ) -> None:
        self.name = name
        self.module = module
        self._passes = passes
        self._masked = masked

    def look(self, after: After) -> None:
        """Run the block on every batch and stay in front of it; what comes out is forgotten."""
        for mask in self.looks():
            after(mask)

    def looks(self) -> Iterator[Tensor | None]:
        """`look`, a batch at a time: yields its mask, and goes on when it is asked for the next.

        So that two models can look at the same batch before either goes on.
        """
        for one in self._passes:
            one.look(self.module)
            yield one.mask if self._masked else None
            one.park()

    def run(self, after: After) -> None:
        """Take every batch through this block, once."""
        passes, self._passes = self._passes, []
        for one in passes:
            one.step()
            # What it reads of this batch is still on the device.
            after(one.mask if self._masked else None)
            one.park()


class SuspendedForward:
    """One batch's forward pass, stopped at the block named `at`."""

    def __init__(self, model: nn.Module, batch: Batch, lot: OffloadPool) -> None:
        self.mask: Tensor | None = None
        self.at: str | None = None
        self._call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._model = model
        self._batch = batch
        self._lot = lot
        self._parked = OffloadedTensors(lot)
        self._coroutine = greenlet(self._forward)

    def _forward(self) -> None:
        # The batch is the caller's: were it among these variables, it would be parked.
        moved = {
            key: _own(value, self._lot.device) if isinstance(value, Tensor) else value
            for key, value in self._batch.items()
        }
        if accepts_use_cache(self._model):
            moved["use_cache"] = False  # or the keys and values of all blocks would be kept
        if "attention_mask" in moved:
            self.mask = moved["attention_mask"].bool()
        self._model(**moved)

    def step(self) -> None:
        """Go on to the next block."""
        self._parked.resume()
        self._call = ((), {})
        with torch.no_grad():
            reached = self._coroutine.switch()
        self.at = None
        if isinstance(reached, tuple):
            self.at, *call = reached
            self._call = call[0], call[1]

    def look(self, block: nn.Module) -> None:
        """Run the block it stopped at, and forget what comes out."""
        self._parked.resume()
        args, kwargs = self._call
        with torch.no_grad():
            block(*args, **kwargs)

    def park(self) -> None:
        """Let all that the stopped pass holds wait off the device."""
        if not self._lot.idle:
            self._parked.park(_held(self._coroutine))

    def end(self) -> None:
        """Give the pass up where it is."""
        if not self._coroutine.dead:
            self._coroutine.throw(GreenletExit)
        self._call = ((), {})
        self._parked.end()


def _own(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`, in an object that is not the caller's."""
    return tensor.to(device).detach()


def accepts_use_cache(model: nn.Module) -> bool:
    """Whether its forward knows `use_cache`, or hands it on to a model that does."""
    known = inspect.signature(model.forward).parameters
    hands_on = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in known.values())
    return "use_cache" in known or (isinstance(model, PreTrainedModel) and hands_on)


def _held(coroutine: greenlet) -> Iterator[Tensor]:
    """The tensors among the variables of a stopped coroutine's functions."""
    frame = coroutine.gr_frame
    while frame is not None:
        yield from tensors_in(frame.f_locals)
        frame = frame.f_back
