"""The original model: its configuration, tokenizer and reader, and its weights on demand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as with_values
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from emloc.data.chat_template import PROMPT_DATE
from emloc.data.reader import OpenCheckpoint, Reader, ReaderSettings, TextReaderSettings
from emloc.data.stored_features import FeatureLayout, FindFeatures, StoredFeaturesReader
from emloc.errors import ConfigError
from emloc.models.checkpoint.checkpoint import Checkpoint
from emloc.models.checkpoint.damaged import require_finite
from emloc.models.checkpoint.internvl_chat import FORMAT
from emloc.models.checkpoint.random_weights import RandomWeights, tensor_inits
from emloc.models.checkpoint.state import optional_names, persistent_buffers, state_dtypes
from emloc.models.checkpoint.tokenizer import tokenizer_of
from emloc.models.checkpoint.tower import leave_out_tower, tower_modules
from emloc.models.checkpoint.weights import SafetensorsWeights, Weights
from emloc.models.objectives import Objective
from emloc.models.objectives.tokens import Tokens
from emloc.runtime.digest import digest
from emloc.runtime.work_meter import count_weights
from emloc.tensors.nn.surgery import replace_tensor

CPU = torch.device("cpu")
# Seed of a fresh module's weights, until a training run draws them again from its own seed.
FRESH_SEED = 0
# Raised when a checkpoint is read, or its examples are encoded, in another way than before.
READING = 2


@dataclass(frozen=True)
class Source:
    """The original model: its configuration, its model class and the origin of its weights.

    `identity` identifies the content of the weights, so that the cache key changes with the
    weights. `name` and `base` are in no key.
    """

    folder: Path | None  # configuration, tokenizer and safetensors; None: only `shape` is available
    name: str
    identity: str
    dtype: torch.dtype
    auto: Any = AutoModelForCausalLM  # transformers class that builds the model
    shape: Mapping[str, Any] = field(default_factory=dict)  # configuration if `folder` is None
    seed: int | None = None  # seed of random weights; None: the weights in `folder`
    # How the model reads examples.
    reader_settings: ReaderSettings = field(default_factory=TextReaderSettings)
    objective: Objective = field(default_factory=Tokens)  # training loss and held-out scores
    # Names of modules with new weights instead of the checkpoint's; all their weights are trained.
    fresh_modules: tuple[str, ...] = ()
    # Values of the configuration that replace the checkpoint's, such as the number of classes.
    config_changes: Mapping[str, Any] = field(default_factory=dict)
    # Name under which other libraries load the model, for the adapter of a run; "": `name`.
    base: str = ""
    base_revision: str | None = None  # revision of `base` on the hub; None: the newest
    # Finds stored features of images; the model then has no vision tower. None: it has its own.
    features: FindFeatures | None = None
    # Whether emulators of the model have its own vision tower, as a training on features has it.
    whole_tower: bool = False

    @property
    def key(self) -> list[Any]:
        """Cache key of the model, part of the key of every stage that reads the model."""
        family = [*self.reader_settings.key, *self.objective.key]
        changes = [*self.fresh_modules, digest(dict(self.config_changes))]
        own = changes if self.fresh_modules or self.config_changes else []
        return [
            READING, PROMPT_DATE.isoformat(), self.identity, str(self.dtype), self.auto.__name__,
            *family, *own, *([] if self.features is None else ["stored features"]),
            *(["whole tower"] if self.whole_tower else []),
        ]  # fmt: skip

    def with_features(self, find: FindFeatures) -> Source:
        """Return the same model without its vision tower; batches have stored features."""
        return self._changed(features=find)

    def with_whole_tower(self) -> Source:
        """Return the same model, whose emulators have its own vision tower."""
        return self._changed(whole_tower=True)

    def emulated(self, layers: Iterable[str]) -> list[str]:
        """Return those layers of an emulator that replace layers of this model, in their order."""
        if self.features is None and not self.whole_tower:
            return list(layers)
        inside = tuple(f"{name}." for name in self.tower)
        return [name for name in layers if not name.startswith(inside)]

    def _changed(self, **fields: Any) -> Source:
        source = with_values(self, **fields)
        # The files are parsed once, and a large model takes seconds to build.
        vars(source)["_checkpoint"] = self._checkpoint
        return source

    @cached_property
    def _checkpoint(self) -> Checkpoint:
        """The model's configuration and weights."""
        return Checkpoint(
            self.folder,
            self.name,
            self.dtype,
            self.auto,
            self.shape,
            self.seed,
            self.fresh_modules,
            self.config_changes,
        )

    @property
    def weights(self) -> Weights:
        """The origin of the weights: safetensors files, a random generator, or none."""
        return self._checkpoint.weights

    @property
    def authors_format(self) -> str | None:
        """Format of a checkpoint whose layers are not those of transformers' model; None: they are.

        Servers load such a checkpoint with its authors' layers, which an adapter does not fit.
        """
        return FORMAT if self.seed is None and self._checkpoint.internvl_chat else None

    @property
    def config(self) -> PretrainedConfig:
        """The model's configuration in transformers; see `Checkpoint.config`."""
        return self._checkpoint.config

    def stores_by_name(self, parameter: str) -> bool:
        """Whether files of this format store the parameter in a tensor of its own name."""
        return self._checkpoint.stores_by_name(parameter)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer; the end token serves as padding token if there is none.

        Raises:
            ConfigError: the source has no checkpoint folder.
        """
        if self.folder is None:
            raise _no_tokenizer_error(self.name)
        tokenizer = tokenizer_of(
            self.folder, self.config if self._checkpoint.internvl_chat else None
        )
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def reader(self) -> Reader:
        """The reader that encodes examples and collates batches, shared by all callers.

        Raises:
            ConfigError: the source has no checkpoint folder, or the checkpoint does not fit the
                model family.
        """
        return self._reader

    @cached_property
    def _reader(self) -> Reader:
        """The reader, opened at its first use."""
        if self.folder is None:
            raise _no_tokenizer_error(self.name)
        reader = self.reader_settings.reader(
            OpenCheckpoint(self.folder, self.tokenizer, self.config, self.dtype)
        )
        if self.features is None:
            return reader
        return StoredFeaturesReader(reader, self.features, self.config.image_token_id)

    def skeleton(self) -> PreTrainedModel:
        """A new model without weights: all parameters are on the meta device.

        Buffers have values, since buffers such as rotary frequencies are computed, not stored.

        Raises:
            ConfigError: the configuration does not fit the model family.
        """
        model = self._checkpoint.new_model(self.config)
        if self.features is not None:
            files = self.features()
            leave_out_tower(model, FeatureLayout() if files is None else files.layout)
        return model

    @cached_property
    def tower(self) -> list[str]:
        """Names of the modules of the original that compute features of images."""
        return tower_modules(self._checkpoint.declared_model)

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Name -> (output features, input features) of every `nn.Linear`, in model order."""
        return {
            name: (module.out_features, module.in_features)
            for name, module in self.meta_model.named_modules()
            if isinstance(module, nn.Linear)
        }

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Parameter name -> number of elements; tied parameters appear once."""
        return {name: parameter.numel() for name, parameter in self.meta_model.named_parameters()}

    @cached_property
    def meta_model(self) -> PreTrainedModel:
        """A shared skeleton with tied parameters, to look up names and shapes; never changed."""
        if self.features is None and not self._checkpoint.is_untied:
            return self._checkpoint.declared_model
        model = self.skeleton()
        model.tie_weights()
        return model

    @cached_property
    def buffers(self) -> list[str]:
        """Names of the buffers that are read with the weights; random models compute them."""
        if not isinstance(self.weights, SafetensorsWeights):
            return []
        names = [name for name in persistent_buffers(self.meta_model) if not self._is_fresh(name)]
        unread = optional_names(self.meta_model, names) - set(self.weights.names)
        return [name for name in names if name not in unread]

    @cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Name of a parameter or persistent buffer -> its dtype in the loaded model."""
        return state_dtypes(self.meta_model, self.dtype)

    def require(self, names: list[str]) -> None:
        """Check that the weights contain all named tensors.

        Raises:
            ConfigError: a tensor is missing.
        """
        missing = [
            name for name in names if name not in self.weights.names and not self._is_fresh(name)
        ]
        if missing:
            raise ConfigError(
                f"{self.weights.description}: holds no tensor {missing[0]}; "
                "set model.source to another checkpoint"
            )

    def read(
        self,
        names: list[str],
        device: torch.device = CPU,
        ahead: Mapping[str, Tensor] | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) of parameters and buffers, one at a time, in the model's dtypes.

        Stored tensors come in the order of the files and are read straight to `device`. The
        generator keeps no reference to a tensor while it reads the next one. Tensors in `ahead`,
        which `read_ahead` has yielded, come first and are only copied.

        Raises:
            ConfigError: a tensor is missing, or has NaN or infinite values.
        """
        self.require(names)
        fresh_names = [name for name in names if self._is_fresh(name)]
        stored_names = [name for name in names if name not in fresh_names] if fresh_names else names
        for name, tensor in self._stored(stored_names, device, ahead or {}):
            tensor = tensor.to(self.dtypes[name])
            if self.seed is None and name in self.sizes:  # a buffer may hold a mask of -inf
                require_finite(self.weights.description, name, tensor)
            count_weights(tensor.nbytes)
            yield name, tensor
            del tensor  # otherwise this variable keeps the memory while the next tensor is read
        yield from self._draw(FRESH_SEED, fresh_names, device)

    def _stored(
        self, names: list[str], device: torch.device, ahead: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) as the weights have them, copied from `ahead` or read."""
        for name in names:
            if name in ahead:
                yield name, ahead[name].to(device, non_blocking=True)
        yield from self.weights.read([name for name in names if name not in ahead], device)

    def read_ahead(self, names: Sequence[str], *, pinned: bool) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor in host memory), as the files store it, for `ahead` of `read`.

        Names of tensors that do not come from the disk are left out.
        """
        stored_names = self.weights.names
        from_disk = [n for n in names if n in stored_names and not self._is_fresh(n)]
        return self.weights.read_ahead(from_disk, pinned=pinned)

    def weight(self, module: str, device: torch.device = CPU) -> Tensor:
        """The weight (output features, input features) of the linear layer `module`."""
        [(_, tensor)] = self.read([f"{module}.weight"], device)
        return tensor

    def bias(self, module: str, device: torch.device = CPU) -> Tensor | None:
        """The bias (output features,) of the linear layer `module`; None if it has no bias."""
        name = f"{module}.bias"
        if name not in self.weights.names:
            return None
        [(_, tensor)] = self.read([name], device)
        return tensor

    def fill(
        self,
        model: nn.Module,
        names: Iterable[str],
        device: torch.device,
        ahead: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Load named parameters and buffers of `model` to `device`; move all buffers there.

        Tensors that the weights do not contain are left as they are. Tensors in `ahead` were
        read by `read_ahead` and are only copied.
        """
        stored_names = self.weights.names
        available = [name for name in names if name in stored_names or self._is_fresh(name)]
        for name, tensor in self.read(available, device, ahead):
            replace_tensor(model, name, tensor)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.device != device and not buffer.is_meta:
                    setattr(module, name, buffer.to(device))

    def load(
        self, device: torch.device, replace: Mapping[str, nn.Module] | None = None
    ) -> PreTrainedModel:
        """Load the frozen model to `device`, with the modules in `replace` instead of its own.

        Args:
            device: device of all parameters and buffers.
            replace: module name -> module with weights; the weights of the replaced module are
                never read.

        Raises:
            ConfigError: the checkpoint has no weights for a parameter.
        """
        model = self.skeleton()
        for name, module in (replace or {}).items():
            model.set_submodule(name, module)
        replaced = tuple(f"{name}." for name in replace or ())
        buffers = [name for name in self.buffers if not name.startswith(replaced)]
        parameters = [n for n, p in model.named_parameters() if p.is_meta]
        self.fill(model, [*parameters, *buffers], device)
        model.tie_weights()
        parameters = [n for n, p in model.named_parameters() if p.is_meta]
        self.require([*parameters, *buffers])
        return model.to(device).requires_grad_(False)

    def redraw_fresh_modules(self, model: nn.Module, seed: int) -> None:
        """Draw new weights from `seed` for the fresh modules of `model`; no parameter is moved."""
        names = [name for name in self.sizes if self._is_fresh(name)]
        for name, tensor in self._draw(seed, names, CPU):
            replace_tensor(model, name, tensor.to(model.get_parameter(name).device))

    def _is_fresh(self, parameter: str) -> bool:
        """Whether the parameter belongs to a fresh module."""
        return parameter.startswith(tuple(f"{name}." for name in self.fresh_modules))

    def _draw(
        self, seed: int, names: Sequence[str], device: torch.device
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) for parameters of fresh modules, random float32 values.

        The values are drawn on the CPU, so that they do not depend on the device.
        """
        if names:
            inits = tensor_inits(self.meta_model)
            yield from RandomWeights(seed, inits, torch.float32, "cpu").read(list(names), device)


def _no_tokenizer_error(name: str) -> ConfigError:
    """The error for a source that has no checkpoint folder."""
    return ConfigError(
        f"{name}: without a checkpoint there is no tokenizer; set model.source=/path/to/checkpoint"
    )
