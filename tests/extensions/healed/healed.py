"""A plug-in: a stage between emulate and train that improves the factors of an SVD emulator."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from emloc.emulators.svd import Svd
from emloc.errors import ConfigError
from emloc.runtime.journal import Journal
from emloc.runtime.safetensors_file import write_safetensors
from emloc.runtime.stage_cache import Facts
from emloc.stages import EMULATOR, Context, Stage


@dataclass(frozen=True, kw_only=True)
class Heal(Stage):
    """Gradient descent on u (m, k) for the error |W - u v|^2 of each layer.

    `rate` is the step size as a share of the largest stable step size.
    """

    gives = EMULATOR

    steps: int
    rate: float

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(
                f"stage.heal.steps must be at least 1, got {self.steps}; set stage.heal.steps=4"
            )

    def check(self, context: Context) -> None:
        """Refuse all emulators but an SVD in the model's own dtype."""
        if (
            not isinstance(context.run_config.emulator, Svd)
            or context.run_config.precision is not None
        ):
            raise ConfigError(
                "stage=heal steps on the factors of an SVD emulator in the model's dtype; "
                "set emulator=svd compression.bits=16, or stage=standard"
            )

    def needed(self, context: Context) -> bool:
        """True for all runs, since `check` refuses emulators without factors."""
        return True

    def inputs(self, context: Context) -> list[Any]:
        """The emulator that the stage `emulate` has built."""
        return [context.built_emulator]

    def work(self, folder: Path, context: Context) -> Facts:
        """Write one file of improved factors per block; resume after the last finished block."""
        built_emulator = context.current[EMULATOR].folder
        journal = Journal(folder)
        errors = []
        for path in sorted(built_emulator.glob("model.*.safetensors")):
            if path.stem not in journal.lines:
                error = self._heal(path, journal.file(path.stem), context)
                journal.add(path.stem, error=error)
            errors.append(journal.lines[path.stem]["error"])
        shutil.copy(built_emulator / "layers.json", folder)
        return {"error_left": sum(errors) / len(errors)}

    def _heal(self, path: Path, to: Path, context: Context) -> float:
        """Write the improved block and return the mean ratio of its errors after and before."""
        with safe_open(path, framework="pt", device=str(context.device)) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        ratios = []
        for name in [key for key in tensors if key.endswith(".u")]:
            layer = name.removesuffix(".u")
            weight = context.source.weight(layer, context.device).double()
            # Of layers that share a v only the first one stores it.
            owner = json.loads(metadata[layer]).get("group", [layer])[0]
            u, v = tensors[name].double(), tensors[f"{owner}.v"].double()
            before = (weight - u @ v).square().sum()
            scale = self.rate / torch.linalg.matrix_norm(v, 2) ** 2
            for _ in range(self.steps):
                u = u + scale * (weight - u @ v) @ v.T
            ratios.append(float((weight - u @ v).square().sum() / before))
            tensors[name] = u.to(tensors[name].dtype)
        write_safetensors(to, tensors, metadata)
        return sum(ratios) / len(ratios)
