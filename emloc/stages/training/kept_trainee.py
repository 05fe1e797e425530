"""Keep a trainee and its CUDA graphs for a later job of this process that trains the same one.

The jobs of a sweep often differ only in their learning rate. To load the emulator, to attach the
adapter and to record the graphs takes a job on a small model longer than a hundred steps.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

from emloc.adapters.training_inputs import TrainingInputs
from emloc.emulators import BuiltEmulator
from emloc.runtime.distributed import world_size
from emloc.runtime.kept_memory import KEPT_MEMORY
from emloc.runtime.keys import key_of
from emloc.runtime.memory import free_device_bytes
from emloc.stages.training.graphed_passes import KeptPasses
from emloc.stages.training.trainee import Trainee, open_trainee

log = logging.getLogger(__name__)

# Settings that change neither the model nor its passes.
_UNRELATED = (
    *("learning_rate", "schedule", "warmup", "weight_decay", "clip"),
    *("steps", "log_every", "save_every"),
)
# A trainee is kept if so many times its memory is free: other stages must not run short of it.
LEAST_FREE = 8


@dataclass
class OpenedTrainee:
    """A trainee with a new adapter, and the graphs that it has already."""

    identity: list[Any]
    trainee: Trainee
    new_state: dict[str, Tensor]  # of the adapter before the first step
    passes: KeptPasses = field(default_factory=KeptPasses)


class KeptTrainee:
    """The trainee of the last job, if there are graphs of it and the device has memory to spare."""

    def __init__(self) -> None:
        self._kept: OpenedTrainee | None = None

    @contextmanager
    def opened(
        self, built_emulator: BuiltEmulator, training_inputs: TrainingInputs, device: torch.device
    ) -> Iterator[OpenedTrainee]:
        """Open a trainee, or take the one of an earlier job, for the block; keep it behind that.

        The adapter is the same as in a trainee that is opened anew. If the block fails, the trainee
        is not kept.
        """
        identity = _identity(built_emulator, training_inputs, device)
        if self._kept is not None and self._kept.identity == identity:
            entry, self._kept = self._kept, None
            KEPT_MEMORY.take()
            log.info("train: the emulator of an earlier job is still loaded and is used again")
            set_seed(training_inputs.seed)
            training_inputs.adapter.restore(entry.trainee.model, entry.new_state)
            entry.trainee = replace(
                entry.trainee, built_emulator=built_emulator, training_inputs=training_inputs
            )
        else:
            KEPT_MEMORY.give_back()
            trainee = open_trainee(built_emulator, training_inputs, device)
            state = training_inputs.adapter.state(trainee.model)
            entry = OpenedTrainee(
                identity, trainee, {name: value.cpu().clone() for name, value in state.items()}
            )
        yield entry
        self._keep(entry)

    def _keep(self, entry: OpenedTrainee) -> None:
        """Keep a trainee whose training has ended, or give its graphs back."""
        if not entry.passes.has_graphs or world_size() > 1:
            return
        if _has_memory_to_spare(entry.trainee):
            self._kept = entry
            KEPT_MEMORY.keep(self._release)
        else:
            entry.passes.release()

    def _release(self) -> None:
        """Give all memory back."""
        assert self._kept is not None
        self._kept.passes.release()
        self._kept = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def _identity(
    built_emulator: BuiltEmulator, training_inputs: TrainingInputs, device: torch.device
) -> list[Any]:
    """Return what the loaded model and the operations of its passes depend on."""
    recipe = {
        name: value
        for name, value in vars(training_inputs.recipe).items()
        if name not in _UNRELATED
    }
    return [
        *(key_of(built_emulator), key_of(training_inputs.adapter), key_of(training_inputs.lora)),
        *(training_inputs.layers, training_inputs.seed, recipe, str(device)),
        *([torch.cuda.current_device()] if device.type == "cuda" else []),
    ]


def _has_memory_to_spare(trainee: Trainee) -> bool:
    """Return whether the device has much more free memory than the trainee and the original take.

    What it takes is its peak, since the next training has the same.
    """
    if trainee.device.type != "cuda":
        return False
    source = trainee.built_emulator.source
    original = sum(source.sizes.values()) * source.dtype.itemsize
    needed_bytes = torch.cuda.max_memory_reserved(trainee.device) + original
    return free_device_bytes(trainee.device) >= LEAST_FREE * needed_bytes
