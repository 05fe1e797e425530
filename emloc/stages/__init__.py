"""The interface of a stage. Each stage of a run is a file of this folder.

A stage is a part of the configuration (`stage` group), as an emulator or an adapter is.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from emloc.calibration.offload import StateLimits
from emloc.calibration.samples import Samples
from emloc.config.part import Part
from emloc.data.stored_features import FeatureFiles
from emloc.emulators import BuiltEmulator, Plan
from emloc.models.checkpoint.source import Source
from emloc.runtime.attempts import earlier_attempts
from emloc.runtime.keys import class_name, key_of, without_neutral
from emloc.runtime.stage_cache import Artifact, Facts
from emloc.runtime.work_meter import metered
from emloc.stages.counted_work import measured_work
from emloc.stages.feature_files import open_features
from emloc.stages.training.anchored_rows import AnchoredRows, anchored_rows
from emloc.stages.training.callbacks import Report

if TYPE_CHECKING:
    from emloc.adapters.training_inputs import TrainingInputs
    from emloc.calibration.calibrate import Layers
    from emloc.stages.run_config import RunConfig
    from emloc.stages.training.kept_trainee import KeptTrainee

# Kinds of artifacts. Later stages read the newest artifact of a kind.
STATISTICS, EMULATOR, TRAINED, RECOVERED = "statistics", "emulator", "trained", "recovered"
ANCHORS, FEATURES = "anchors", "features"
SCORES, SCORES_AS_TRAINED = "scores", "scores as trained"


@dataclass
class Context:
    """Everything that a stage can read: the checked settings and earlier stages' artifacts."""

    run_config: RunConfig  # with the ratio and the precision that compression=auto has chosen
    source: Source  # the original model
    layers: Layers  # layers that an emulator may compress: name -> (out, in)
    plan: Plan | None  # what the emulator is built to, such as the rank of each layer
    samples: Samples | None  # calibration samples; None if no stage reads them
    # Adapter, layers, rows and recipe of the training; None if the run trains nothing.
    training_inputs: TrainingInputs | None
    device: torch.device
    limits: StateLimits  # memory that hidden states may use
    report: Report  # called with each line of the training log
    cache: Path  # folder of the stages' artifacts
    # What an earlier training of this process has loaded; None: this training loads all anew.
    keeper: KeptTrainee | None = None
    artifacts: dict[str, Artifact] = field(default_factory=dict)  # by stage, in order
    current: dict[str, Artifact] = field(default_factory=dict)  # kind -> newest artifact

    @cached_property
    def anchored_rows(self) -> AnchoredRows:
        """The rows, places and rounds of an anchored training, read once for all stages."""
        anchor, disk_gib = self.run_config.anchor, self.run_config.budget.disk_gib
        assert anchor.anchors
        assert self.training_inputs is not None
        return anchored_rows(anchor, self.training_source, self.training_inputs, disk_gib)

    @cached_property
    def training_source(self) -> Source:
        """The original as a training reads it: with stored features it has no vision tower."""
        if self.training_inputs is None or not self.training_inputs.recipe.stores_features:
            return self.source
        return self.source.with_features(
            lambda: self._feature_files if FEATURES in self.current else None
        )

    @cached_property
    def _feature_files(self) -> FeatureFiles:
        """The stored features, behind their stage."""
        return open_features(self.current[FEATURES])

    @property
    def trained_emulator(self) -> BuiltEmulator:
        """Return the newest emulator as it is trained: with stored features without its tower.

        Raises:
            KeyError: no stage has built an emulator yet.
        """
        return replace(self.built_emulator, source=self.training_source)

    @property
    def emulator_with_tower(self) -> BuiltEmulator:
        """Return the emulator that was trained, with the vision tower that it was trained behind.

        Raises:
            KeyError: no stage has built an emulator yet.
        """
        if self.training_source is self.source:
            return self.built_emulator
        return replace(self.built_emulator, source=self.source.with_whole_tower())

    @property
    def built_emulator(self) -> BuiltEmulator:
        """Return the emulator as the newest artifact of its kind stores it.

        Raises:
            KeyError: no stage has built an emulator yet.
        """
        run_config = self.run_config
        return BuiltEmulator(
            run_config.emulator, self.current[EMULATOR], self.source, run_config.precision
        )


@dataclass(frozen=True, kw_only=True)
class Stage(Part):
    """A stage of a run: whether the run needs it, what its result depends on, and its work.

    The fields below set the stage's place in the order and its part in reports. The fields of a
    subclass are its settings, which are part of its cache key.
    """

    section: ClassVar[str] = "stage"

    version: ClassVar[int] = 1  # raise this number when the meaning of the artifact's files changes
    gives: ClassVar[str]  # kind of its artifact: a kind from above, or a new one
    reads_samples: ClassVar[bool] = False  # whether the stage itself reads calibration samples
    # File of the artifact -> name of its copy in the run's folder.
    collected: ClassVar[Mapping[str, str]] = MappingProxyType({})
    logged_as: ClassVar[str] = ""  # prefix of its numbers in metrics.jsonl; empty: its name

    after: str | None  # the stage that it follows directly; null: it is the first
    counted: bool = True  # whether seconds, arithmetic and weights count as cost of fine-tuning
    column: bool = True  # whether the tables have a column for its seconds

    @property
    def key(self) -> dict[str, Any]:
        """Return the JSON value of the stage in its cache key: its class and its own settings.

        Its place in the order is left out, since the key contains the inputs of the stage.
        """
        names = [setting.name for setting in fields(self) if setting.name not in _NOT_IN_KEY]
        values = without_neutral({name: getattr(self, name) for name in names}, type(self))
        return {"part": class_name(type(self)), **{name: key_of(v) for name, v in values.items()}}

    def check(self, context: Context) -> None:
        """Check the settings that the stage depends on, before any stage of the run begins.

        Raises:
            ConfigError: names the reason and an override that mends the settings.
        """
        return

    def together(self, context: Context) -> bool:
        """Return whether all processes of a launch work on the stage together."""
        return False

    @abstractmethod
    def needed(self, context: Context) -> bool:
        """Return whether the run needs this stage; called when all earlier stages are finished."""

    @abstractmethod
    def inputs(self, context: Context) -> list[Any]:
        """Return all values that the result depends on, except the stage's own settings.

        Each value has a cache key, see `emloc.runtime.keys.key_of`.
        """

    @abstractmethod
    def work(self, folder: Path, context: Context) -> Facts:
        """Write the files of the artifact into `folder` and return facts about them.

        `enter` adds the facts `row_forwards` and `weights_read` of a stage that is `counted`, as
        `measured_work` measures them. A stage that runs a model by a loop of its own returns
        `row_forwards` itself.
        """

    def enter(self, folder: Path, *_: Any, context: Context) -> Facts:
        """Call `work` for the store, which hashes the inputs but not the context."""
        with metered(earlier_attempts(folder)) as meter:
            facts = self.work(folder, context)
        if not self.counted:
            return facts
        return measured_work(meter, context.source, together=self.together(context)) | facts


_NOT_IN_KEY = ("after", "counted", "column")
