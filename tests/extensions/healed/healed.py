"""A stage between emulate and train: gradient steps on the factors of an SVD emulator."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from emloc.emulators.svd import Svd
from emloc.errors import ConfigError
from emloc.runtime.journal import Journal
from emloc.runtime.safetensors_file import write_shard
from emloc.runtime.stage_cache import Facts
from emloc.stages import EMULATOR, Context, Stage


@dataclass(frozen=True, kw_only=True)
class Heal(Stage):
    """Steps on u (m, k) down the slope of |W - u v|^2, each `rate` of the steepest stable one."""

    gives = EMULATOR

    steps: int
    rate: float

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(
                f"stage.heal.steps must be at least 1, got {self.steps}; set stage.heal.steps=4"
            )

    def check(self, context: Context) -> None:
        """Factors in the model's own dtype are healed, and nothing else."""
        if (
            not isinstance(context.run_config.emulator, Svd)
            or context.run_config.precision is not None
        ):
            raise ConfigError(
                "stage=heal steps on the factors of an SVD emulator in the model's dtype; "
                "set emulator=svd compression.bits=16, or stage=standard"
            )

    def needed(self, context: Context) -> bool:
        """Always: `check` refuses what has no factors."""
        return True

    def inputs(self, context: Context) -> list[Any]:
        """The emulator as it was built."""
        return [context.built_emulator]

    def work(self, folder: Path, context: Context) -> Facts:
        """One file of factors per block, in the emulator's own format; goes on where it stopped."""
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
        """Write the healed block; the mean share of the layers' squared errors that is left."""
        with safe_open(path, framework="pt", device=str(context.device)) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        left = []
        for name in [one for one in tensors if one.endswith(".u")]:
            layer = name.removesuffix(".u")
            weight = context.source.weight(layer, context.device).double()
            u, v = tensors[name].double(), tensors[f"{layer}.v"].double()
            before = (weight - u @ v).square().sum()
            scale = self.rate / torch.linalg.matrix_norm(v, 2) ** 2
            for _ in range(self.steps):
                u = u + scale * (weight - u @ v) @ v.T
            left.append(float((weight - u @ v).square().sum() / before))
            tensors[name] = u.to(tensors[name].dtype)
        write_shard(to, tensors, metadata)
        return sum(left) / len(left)
