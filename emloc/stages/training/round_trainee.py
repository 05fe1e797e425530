"""The model that an anchored training trains: the emulator of a round, with a state's adapter."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from emloc.adapters.training_inputs import TrainingInputs
from emloc.emulators import BuiltEmulator
from emloc.models.checkpoint.source import Source
from emloc.runtime.distributed import is_sharded
from emloc.stages.training.graphed_passes import KeptPasses
from emloc.stages.training.trainee import Trainee, open_trainee
from emloc.stages.training.trainer import STATE_FILE


@dataclass(frozen=True)
class State:
    """The state of a training between two rounds: adapter, optimizer and schedule."""

    step: int = 0  # of the schedule
    checkpoint: Path | None = None  # None: the new adapter, before the first step
    adapter: Path | None = None  # folder of the saved adapter; None: the new adapter

    def __str__(self) -> str:
        return f"step {self.step}"


class RoundTrainee:
    """Loads the emulator of the present round with an adapter, one emulator at a time.

    Attributes:
        emulator: of the present round; set it to another one to train through that.
        is_split: whether a round has split the weights of the loaded model (FSDP).
        kept_passes: the graphs of the loaded model for its next round; None: each round has an
            emulator of its own.
        training_inputs: what is trained, on which rows.
        device: that is trained on.
    """

    def __init__(self, trainee: Trainee, kept_passes: KeptPasses | None) -> None:
        self.emulator: BuiltEmulator = trainee.built_emulator
        self.is_split = False
        self.kept_passes = kept_passes
        self.training_inputs: TrainingInputs = trainee.training_inputs
        self.device: torch.device = trainee.device
        self._trainee: Trainee | None = trainee
        adapter = trainee.training_inputs.adapter
        state = adapter.state(trainee.model)
        self._new_state = {name: tensor.cpu().clone() for name, tensor in state.items()}

    @property
    def source(self) -> Source:
        """The original model."""
        return self.emulator.source

    def open(self, *, whole: bool = False) -> Trainee:
        """Return the emulator of the present round, with the adapter as it was trained last.

        If it is not loaded, the loaded one is put away first, and the adapter is a new one. With
        `whole` the emulator is loaded again if a round has split its weights.
        """
        trainee = self._trainee
        if trainee is not None:
            is_other = trainee.built_emulator.artifact.folder != self.emulator.artifact.folder
            if not is_other and not (whole and self.is_split):
                return trainee
        del trainee
        self.close()
        self._trainee = open_trainee(self.emulator, self.training_inputs, self.device)
        self.is_split = False
        return self._trainee

    def close(self) -> None:
        """Free the memory of the loaded emulator; the next `open` loads one."""
        self._trainee = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def load(self, state: State, *, whole: bool = False) -> Trainee:
        """Return the emulator with the adapter of a state; see `open`.

        Under FSDP the checkpoint is in shards, which the Trainer reads when it resumes.
        """
        trainee = self.open(whole=whole)
        if is_sharded() and state.checkpoint is not None:
            return trainee
        stored = self._new_state
        if state.checkpoint is not None:
            stored = load_file(state.checkpoint / STATE_FILE)
        self.training_inputs.adapter.restore(trainee.model, stored)
        return trainee

    def facts(self, rows: int) -> dict[str, Any]:
        """Return the number of trainable parameters, and the work of a training on so many rows."""
        trainee = self.open()
        return {"trainable": trainee.trainable, **trainee.work(rows)}

    def save(self, folder: Path) -> None:
        """Write the present adapter into `folder`."""
        self.training_inputs.adapter.save(self.open().model, folder, self.source.name)
