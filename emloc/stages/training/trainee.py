"""The emulator with an adapter on it, as a training gets it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, set_seed

from emloc.adapters.training_inputs import TrainingInputs
from emloc.config.settings import MODEL_BITS
from emloc.emulators import BuiltEmulator
from emloc.emulators.operations import operations_share
from emloc.errors import ConfigError
from emloc.models.objectives import Loss
from emloc.precision import PackedLayer
from emloc.runtime.distributed import is_sharded
from emloc.stages.training.lean_setup import prepare_model, required_override
from emloc.stages.training.work import training_work


@dataclass(frozen=True)
class Trainee:
    """An emulator with an adapter on it, ready to be trained."""

    model: Any
    built_emulator: BuiltEmulator
    training_inputs: TrainingInputs
    device: torch.device
    share: float  # operations of the emulator as a share of the original's
    lean: bool  # whether the memory-saving path is set up
    fused: bool  # whether each layer is fused with its adapter, and casts its operands itself
    loss: Loss | None  # the objective's chunked loss
    path: str  # log line about the memory-saving path; empty with train.lean=false

    @property
    def trainable(self) -> int:
        """Number of trainable parameters."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def work(self, rows: int) -> dict[str, float]:
        """Return the facts about the arithmetic of a training on so many rows."""
        recomputes = self.training_inputs.recipe.checkpointing
        return training_work(rows, self.share, recomputes=recomputes)

    @property
    def inner(self) -> PreTrainedModel:
        """The transformers model inside."""
        return self.training_inputs.adapter.base(self.model)

    @property
    def mixed(self) -> bool:
        """Whether the model is trained under autocast to its 16-bit dtype."""
        return self.built_emulator.source.dtype == torch.bfloat16 and not self.fused

    def context(self) -> AbstractContextManager[Any]:
        """Return the context of a forward pass as training runs it: autocast where it is on."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed)


def open_trainee(
    built_emulator: BuiltEmulator,
    training_inputs: TrainingInputs,
    device: torch.device,
    start: Path | None = None,
) -> Trainee:
    """Load the emulator and attach the adapter: a new one, or the one in the folder `start`.

    Raises:
        ConfigError: FSDP is to split weights in a packed format.
    """
    source = built_emulator.source
    # Weights that FSDP splits stay in host memory, mapped from their files, and move to the device
    # block by block.
    model = built_emulator.open(torch.device("cpu") if is_sharded() else device)
    share = operations_share(model, source)
    if is_sharded() and (
        packed_layers := [m for m in model.modules() if isinstance(m, PackedLayer)]
    ):
        raise ConfigError(
            f"FSDP cannot split weights of {packed_layers[0].matrix.precision.bits} bits; "
            f"set compression.bits={MODEL_BITS}, or launch without FSDP"
        )
    set_seed(training_inputs.seed)
    source.redraw_fresh_modules(model, training_inputs.seed)
    if start is None:
        model = training_inputs.adapter.attach(
            model,
            training_inputs.lora,
            built_emulator.targets(training_inputs.layers),
            source.fresh_modules,
        )
    else:
        model = training_inputs.adapter.load(model, start, trainable=True)
    lean, fused, loss, path = training_inputs.recipe.lean, False, None, ""
    if lean and (override := required_override(training_inputs.lora)):
        path = f"train: PEFT's own layers, which take more memory and time; {override} avoids them"
        lean = False
    elif lean:
        fused, loss, path = prepare_model(
            model, training_inputs.adapter, training_inputs.recipe, source.objective
        )
    return Trainee(model, built_emulator, training_inputs, device, share, lean, fused, loss, path)
