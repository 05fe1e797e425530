"""Run a model block by block over many batches, with one block's weights in memory at a time.

The model's own `forward` does the work. Every batch's forward pass is a coroutine that stops where
it enters a block; once all have arrived there the block's weights are read, the passes go through
it one after the other, and the weights are dropped. So masks, position tables and whatever else a
model hands to its blocks are right for any architecture, and nothing of it is written again here.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from emloc.source import Source

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


def open_walk(
    source: Source, batches: Sequence[Batch], blocks: Sequence[str], device: torch.device
) -> Iterator[Block]:
    """Walk the checkpoint: only what lies outside the blocks is held throughout."""
    model = source.skeleton()
    head = model.get_output_embeddings()
    unread = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    needed = [name for name, one in model.named_parameters() if id(one) not in unread]
    source.require(needed)
    inside = tuple(f"{name}." for name in blocks)
    source.fill(model, [name for name in needed if not name.startswith(inside)], device)
    return walk(model, batches, blocks, device, source)


def walk(
    model: nn.Module,
    batches: Sequence[Batch],
    blocks: Sequence[str],
    device: torch.device,
    source: Source | None = None,
) -> Iterator[Block]:
    """Yield the blocks in order, each about to be run; what follows the last one never runs.

    Args:
        model: whole, or with its blocks on the meta device if `source` has their weights.
        batches: keyword arguments for its forward; tensors are moved to `device`.
        blocks: names of the blocks, in the order of the model.
        device: where the model runs.
        source: where to read a block's weights; None if the model has them.
    """
    home = getcurrent()

    def stop_at(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            home.switch(name)

        return hook

    modules = {name: model.get_submodule(name) for name in blocks}
    handles = [module.register_forward_pre_hook(stop_at(name)) for name, module in modules.items()]
    handles.append(modules[blocks[-1]].register_forward_hook(_leave))
    passes = [Pass(model, batch, device) for batch in batches]
    try:
        for one in passes:
            one.step()
        for name, module in modules.items():
            if source is not None:
                source.fill(
                    model, [f"{name}.{leaf}" for leaf, _ in module.named_parameters()], device
                )
            block = Block(name, module, [one for one in passes if one.at == name])
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
    """One block of the model with its weights in place, about to be run."""

    def __init__(self, name: str, module: nn.Module, passes: list[Pass]) -> None:
        self.name = name
        self.module = module
        self._passes = passes

    def run(self, after: After) -> None:
        """Take every batch through this block, once."""
        passes, self._passes = self._passes, []
        for one in passes:
            one.step()
            after(one.mask)


class Pass:
    """One batch's forward pass, stopped at the block named `at`."""

    def __init__(self, model: nn.Module, batch: Batch, device: torch.device) -> None:
        moved = {
            key: value.to(device) if isinstance(value, Tensor) else value
            for key, value in batch.items()
        }
        if "use_cache" in inspect.signature(model.forward).parameters:
            moved["use_cache"] = False  # or the keys and values of all blocks would be kept
        self.mask = moved["attention_mask"].bool() if "attention_mask" in moved else None
        self.at: str | None = None
        self._coroutine = greenlet(lambda: model(**moved))

    def step(self) -> None:
        """Go on to the next block."""
        with torch.no_grad():
            reached = self._coroutine.switch()
        self.at = reached if isinstance(reached, str) else None

    def end(self) -> None:
        """Give the pass up where it is."""
        if not self._coroutine.dead:
            self._coroutine.throw(GreenletExit)


def _leave(*_: Any) -> None:
    """End the pass behind the last block: norms and the vocabulary are not needed."""
    raise GreenletExit
