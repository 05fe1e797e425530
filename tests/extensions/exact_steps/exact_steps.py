"""A plug-in: a recovery that trains the adapter for a few more steps on the original model.

The blocks of the original model stay in host memory and are copied to the device one by one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from emloc.adapters.saved import RECOVERY_FILE
from emloc.data.reader import encode_all
from emloc.emulators import BuildInputs, BuiltEmulator
from emloc.emulators.full import Full
from emloc.errors import ConfigError
from emloc.recovery import Recovery, RecoveryInputs
from emloc.runtime.stage_cache import Artifact
from emloc.stages.training.train import fit_rows


@dataclass(frozen=True, kw_only=True)
class ExactSteps(Recovery):
    """Train on the training rows for `steps` steps with a new optimizer.

    `rate` is relative to the learning rate of the training.
    """

    reads_pairs = False
    trains = True

    steps: int
    rate: float

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(
                f"recovery.steps must be at least 1, got {self.steps}; set recovery.steps=20, or "
                "recovery=none"
            )

    def recover(self, folder: Path, inputs: RecoveryInputs) -> dict[str, Any]:
        """Train the adapter further and write the result."""
        training_inputs, source = inputs.training_inputs, inputs.built_emulator.source
        assert training_inputs is not None
        recipe = replace(
            training_inputs.recipe,
            steps=self.steps,
            learning_rate=self.rate * training_inputs.recipe.learning_rate,
            save_every=1,
        )
        original = folder / "original"
        original.mkdir(exist_ok=True)
        Full().build(original, source, BuildInputs(None, None, None, None), device=inputs.device)
        reader = source.reader()
        facts = fit_rows(
            folder,
            BuiltEmulator(Full(), Artifact("emulate", "", original), source),
            replace(training_inputs, recipe=recipe),
            encode_all(reader, training_inputs.examples, training_inputs.max_length),
            reader.collate,
            device=inputs.device,
            report=inputs.report,
            start=inputs.trained.folder / "adapter",
        )
        (folder / "adapter" / RECOVERY_FILE).write_text(json.dumps({"by": "exact_steps"}))
        return {"exact_steps": facts["steps"], "row_forwards": facts["row_forwards"]}
