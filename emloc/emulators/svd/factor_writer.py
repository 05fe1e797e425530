"""Write the factors of a block while the next block is read and computed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from emloc.emulators.svd.factor_file import read_facts, stored_tensors
from emloc.emulators.svd.factors import LayerFactors
from emloc.runtime.journal import Journal
from emloc.runtime.safetensors_file import write_safetensors


class FactorWriter:
    """A context that writes the files of blocks in a thread, and their lines of the journal.

    The factors of one block at most wait in host memory. An error of the thread is raised by the
    next call, or when the context ends.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._thread = ThreadPoolExecutor(1, "write factors")
        self._pending: Future[None] | None = None

    def __enter__(self) -> FactorWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown()
        if kind is None:  # else the error of the context counts
            self.wait()

    def write(self, block: str, factors: Mapping[str, LayerFactors]) -> dict[str, Any]:
        """Begin to write the factors of a block, and return the facts of each layer.

        From a GPU they are copied to pinned memory, and only the thread waits for the copies.
        """
        copies = {
            name: tensor.to("cpu", non_blocking=True)
            for name, tensor in stored_tensors(factors).items()
        }
        copied = _recorded_event() if any(one.is_pinned() for one in copies.values()) else None
        facts = {name: factors[name].facts for name in sorted(factors)}
        self.wait()
        self._pending = self._thread.submit(self._write, block, copies, facts, copied)
        return facts

    def facts_of(self, block: str) -> dict[str, Any]:
        """Return the facts of each layer of a block whose file an earlier attempt has written."""
        facts = read_facts(self._journal.file(block))
        if block not in self._journal.lines:  # it was killed between the file and the line
            self._note(block, facts)
        return facts

    def wait(self) -> None:
        """Return when the last file is complete.

        Raises:
            OSError: a file cannot be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(
        self,
        block: str,
        tensors: Mapping[str, Tensor],
        facts: dict[str, Any],
        copied: torch.cuda.Event | None,
    ) -> None:
        if copied is not None:
            copied.synchronize()
        metadata = {name: json.dumps(layer) for name, layer in facts.items()}
        write_safetensors(self._journal.file(block), tensors, metadata)
        self._note(block, facts)

    def _note(self, block: str, facts: Mapping[str, Any]) -> None:
        seconds = round(sum(layer["seconds"] for layer in facts.values()), 4)
        self._journal.add(block, layers=[*facts], seconds=seconds)


def _recorded_event() -> torch.cuda.Event:
    """Return an event that happens when the GPU has done all that it has been given so far."""
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event
