"""The stages of a run: one file for each. A stage is a part like an emulator or an adapter."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from emloc.calibration.samples import Samples
from emloc.config.part import Part
from emloc.emulators import BuiltEmulator, Plan
from emloc.models.checkpoint.source import Source
from emloc.runtime.keys import class_name, key_of, without_neutral
from emloc.runtime.stage_cache import Artifact, Facts
from emloc.stages.training.callbacks import Report

if TYPE_CHECKING:
    from emloc.adapters.training_inputs import TrainingInputs
    from emloc.calibration.calibrate import Layers
    from emloc.stages.run_config import RunConfig

# What an artifact is to the stages behind it: the newest of each kind is the one that counts.
STATISTICS, EMULATOR, TRAINED, CARRIED = "statistics", "emulator", "trained", "carried"
SCORES, SCORES_AS_TRAINED = "scores", "scores as trained"


@dataclass
class Context:
    """All that a stage can read: the settings of the run, checked, and what was made so far."""

    run_config: RunConfig  # its ratio and precision as they were solved for
    source: Source  # the model that is trained, carried to and scored
    layers: Layers  # those that an emulator may compress: name -> (out, in)
    plan: Plan | None  # what the emulator is built to
    samples: Samples | None  # of calibration; None where no stage reads them
    training_inputs: (
        TrainingInputs | None
    )  # what the adapter is fitted to; None where nothing is trained
    device: torch.device
    host_bytes: int  # what hidden states may take of host memory
    report: Report  # called with each line of the training log
    made: dict[str, Artifact] = field(default_factory=dict)  # stage -> artifact, in order
    current: dict[str, Artifact] = field(default_factory=dict)  # kind -> the newest of it

    @property
    def built_emulator(self) -> BuiltEmulator:
        """The emulator as the stages so far have left it.

        Raises:
            KeyError: no stage has made one.
        """
        run_config = self.run_config
        return BuiltEmulator(
            run_config.emulator, self.current[EMULATOR], self.source, run_config.precision
        )


@dataclass(frozen=True, kw_only=True)
class Stage(Part):
    """One stage: whether it is needed, what it depends on, and its work.

    The fields say where it stands and how reports treat it. Those of a subclass are its settings,
    which are in its key.
    """

    version: ClassVar[int] = 1  # raised when the meaning of its files changes
    gives: ClassVar[str]  # the kind of its artifact: one of those above, or one of its own
    reads_samples: ClassVar[bool] = False  # beside what emulator and recovery read
    # File of the artifact -> what it is called in the run's folder.
    collected: ClassVar[Mapping[str, str]] = MappingProxyType({})
    logged_as: ClassVar[str] = ""  # what its numbers begin with in metrics.jsonl; empty: its name

    after: str | None  # the stage it stands directly behind; null: the first
    counted: bool = True  # its seconds are part of what fine-tuning costs
    column: bool = True  # its seconds are a column of the tables

    @property
    def key(self) -> dict[str, Any]:
        """Its class and its own settings: where it stands is said by what it depends on."""
        own = [one.name for one in fields(self) if one.name not in _PLACE]
        values = without_neutral({name: getattr(self, name) for name in own}, type(self))
        return {"part": class_name(type(self)), **{name: key_of(v) for name, v in values.items()}}

    def check(self, context: Context) -> None:
        """Refuse what cannot be right, before any stage begins.

        Raises:
            ConfigError: with the reason, and an override that mends it.
        """
        return

    def together(self, context: Context) -> bool:
        """Whether all processes of a launch work on it at the same time."""
        return False

    @abstractmethod
    def needed(self, context: Context) -> bool:
        """Whether the run has this stage; asked when the stages before it are done."""

    @abstractmethod
    def inputs(self, context: Context) -> list[Any]:
        """All that its result depends on, beside its own settings: values that have keys."""

    @abstractmethod
    def work(self, folder: Path, context: Context) -> Facts:
        """Write its files into `folder` and return what is to be known of them."""

    def enter(self, folder: Path, *_: Any, context: Context) -> Facts:
        """Called by the store, which hashes the inputs and not the context."""
        return self.work(folder, context)


_PLACE = ("after", "counted", "column")
