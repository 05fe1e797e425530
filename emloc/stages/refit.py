"""The refit stage: fit a low-rank emulator to what the loss of an anchored training depends on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emloc.anchors.record import Original
from emloc.errors import ConfigError
from emloc.runtime.distributed import is_sharded
from emloc.runtime.stage_cache import Facts
from emloc.stages import EMULATOR, Context, Stage
from emloc.stages.training.refit import Refittable, refit_of
from emloc.stages.training.round_trainee import RoundTrainee
from emloc.stages.training.trainee import open_trainee

# Facts of a stage that say nothing of its artifact.
_OWN = ("seconds", "peak_gib", "row_forwards", "weights_read")


@dataclass(frozen=True, kw_only=True)
class RefitEmulator(Stage):
    """Stage that fits the emulator anew before the first round; it depends on no adapter."""

    gives = EMULATOR

    def needed(self, context: Context) -> bool:
        """Return whether the training is anchored and refits, and the emulator can be fitted."""
        anchor = context.run_config.anchor
        return (
            anchor.anchors
            and anchor.refit
            and context.training_inputs is not None
            and context.samples is not None
            and isinstance(context.run_config.emulator, Refittable)
        )

    def check(self, context: Context) -> None:
        """Refuse to fit an emulator whose weights the training splits over processes.

        Later rounds fit the emulator of the training, by the first process alone.

        Raises:
            ConfigError: FSDP is set.
        """
        if self.needed(context) and is_sharded():
            raise ConfigError(
                "anchor.refit=true: one process fits the emulator anew, which has all of its "
                "weights, and FSDP splits them over the processes; set anchor.refit=false, or "
                "launch without FSDP"
            )

    def inputs(self, context: Context) -> list[Any]:
        """Return the emulator, the samples, the places, and the layers with an adapter."""
        inputs, anchor = context.training_inputs, context.run_config.anchor
        assert inputs is not None
        assert anchor.anchors
        return [
            context.trained_emulator,
            context.samples,
            anchor.offsets_key,
            inputs.layers,
            inputs.recipe.batch,
        ]

    def work(self, folder: Path, context: Context) -> Facts:
        """Fit the emulator and write its files into `folder`."""
        inputs, source = context.training_inputs, context.training_source
        assert inputs is not None
        refit = refit_of(context.anchored_rows, context.samples, context.trained_emulator)
        assert refit is not None
        trainee = RoundTrainee(
            open_trainee(context.trained_emulator, inputs, context.device), kept_passes=None
        )
        row_forwards = refit.run(
            folder,
            trainee,
            lambda: Original(source.skeleton(), source),
            limits=context.limits,
        )
        # The size of the emulator and the names of its samples are those of the one before.
        facts = context.current[EMULATOR].facts
        return {n: v for n, v in facts.items() if n not in _OWN} | {"row_forwards": row_forwards}
