"""A few further steps of training on the original model, whose blocks wait in host memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from emloc.adapters.saved import copy_recovery
from emloc.config.settings import TrainSettings
from emloc.config.values import Range
from emloc.data.reader import training_collate
from emloc.emulators import BuildInputs, BuiltEmulator
from emloc.emulators.offload import Offload
from emloc.errors import ConfigError
from emloc.runtime.distributed import is_sharded
from emloc.runtime.stage_cache import Artifact, Facts
from emloc.stages.polishing import Polish, PolishInputs
from emloc.stages.training.train import fit_rows


@dataclass(frozen=True, kw_only=True)
class ExactSteps(Polish):
    """Train on the next rows, by `emulator=offload`, with a new optimizer.

    The learning rate begins at `rate` times `train.learning_rate`, and falls to zero as a cosine.
    All else is the recipe of the training.
    """

    keeps_weights = False

    steps: Annotated[int, Range(least=1, usual=20)]  # optimizer steps
    rate: Annotated[float, Range(above=0, usual=0.5)]  # first learning rate / train.learning_rate

    def check(self) -> None:
        """Refuse to train where weights are split over processes; see `Polish.check`."""
        if is_sharded():
            raise ConfigError(
                "polish=exact_steps keeps whole blocks of the original in host memory, and FSDP "
                "would split them; launch without FSDP, or set polish=none"
            )

    def polish(self, folder: Path, inputs: PolishInputs) -> Facts:
        """Train the adapter further and write it into `folder`; see `Polish.polish`."""
        source, training_inputs = inputs.source, inputs.training_inputs
        original = folder / "original"
        original.mkdir(exist_ok=True)
        emulator = Offload()
        emulator.build(original, source, BuildInputs(None, None, None, None), device=inputs.device)
        facts = fit_rows(
            folder,
            BuiltEmulator(emulator, Artifact("emulate", "", original), source),
            replace(training_inputs, recipe=self._recipe(training_inputs.recipe)),
            inputs.next_rows(self.steps),
            training_collate(source.reader()),
            device=inputs.device,
            report=inputs.report,
            start=inputs.recovered.folder / "adapter",
        )
        copy_recovery(inputs.recovered.folder / "adapter", folder / "adapter")
        return facts

    def _recipe(self, recipe: TrainSettings) -> TrainSettings:
        return replace(
            recipe,
            steps=self.steps,
            learning_rate=self.rate * recipe.learning_rate,
            schedule="cosine",
            warmup=0.0,
            checkpointing=True,  # a block's weights are gone when its backward pass begins
        )
