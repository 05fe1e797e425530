"""The original model: its configuration, tokenizer and reader, and its weights on demand."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from emloc.data.reader import (
    OpenCheckpoint,
    Reader,
    ReaderSettings,
    TextReaderSettings,
    TokenReader,
    stop_ids,
)
from emloc.errors import ConfigError
from emloc.models.checkpoint.internvl_chat import InternVLChat, read_internvl_chat
from emloc.models.checkpoint.tokenizer import tokenizer_of
from emloc.models.checkpoint.weights import (
    AbsentWeights,
    RandomWeights,
    SafetensorsWeights,
    Weights,
    layout_of,
    random_device_type,
    tensor_inits,
)
from emloc.models.objectives import Objective
from emloc.models.objectives.tokens import Tokens
from emloc.runtime.digest import digest
from emloc.tensors.nn.fresh import compute_in_float32
from emloc.tensors.nn.surgery import replace_parameter

CPU = torch.device("cpu")
# Seed of a fresh module's weights, until a training run draws them again from its own seed.
FRESH_SEED = 0
# Names of files that hold a tokenizer.
_TOKENIZER_FILES = ("tokenizer*", "*vocab*", "*.model")


@dataclass(frozen=True)
class Source:
    """The original model: its configuration, its model class and the origin of its weights.

    `name` becomes `base_model_name_or_path` of an adapter. `identity` identifies the content of the
    weights, so that the cache key changes with the weights.
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

    @property
    def key(self) -> list[str]:
        """Cache key of the model, part of the key of every stage that reads the model."""
        family = [*self.reader_settings.key, *self.objective.key]
        changes = [*self.fresh_modules, digest(dict(self.config_changes))]
        own = changes if self.fresh_modules or self.config_changes else []
        return [
            self.identity, str(self.dtype), self.auto.__name__, *family, *own, *self._encoding_key
        ]  # fmt: skip

    @property
    def _encoding_key(self) -> list[Any]:
        """Cache key of tokens that differ from those of earlier releases; see `encoding_key`."""
        if self.folder is None or not self.objective.writes_text:
            return []
        has_tokenizer = any(any(self.folder.glob(name)) for name in _TOKENIZER_FILES)
        return list(getattr(self.reader(), "encoding_key", ())) if has_tokenizer else []

    @cached_property
    def stop_ids(self) -> list[int]:
        """Ids of all tokens that end a generated answer: the checkpoint's and the turn's own.

        The checkpoint names its tokens in generation_config.json, or else in config.json.
        """
        reader = cast("TokenReader", self.reader())
        return stop_ids(self.meta_model.generation_config, reader)

    @cached_property
    def weights(self) -> Weights:
        """The origin of the weights: safetensors files, a random generator, or none."""
        if self.seed is not None:
            inits = tensor_inits(self.meta_model)
            return RandomWeights(self.seed, inits, self.dtype, random_device_type())
        if self.folder is None:
            return AbsentWeights(self.name)
        chat = self._internvl_chat
        layout = chat.layout() if chat else layout_of(self.meta_model)
        return SafetensorsWeights(self.folder, layout)

    @cached_property
    def _internvl_chat(self) -> InternVLChat | None:
        """The checkpoint in the format of InternVL's authors; None if it has another format."""
        return None if self.folder is None else read_internvl_chat(self.folder)

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's configuration in transformers.

        Raises:
            ConfigError: transformers does not implement the model or one of its settings.
        """
        origin = "model.shape" if self.folder is None else f"{self.folder}: config.json"
        chat_shape = None if self._internvl_chat is None else self._internvl_chat.shape()
        try:
            if chat_shape is not None:
                return AutoConfig.for_model(**chat_shape)
            if self.folder is not None:
                # Code in a checkpoint is never run. Without the flag transformers asks the user.
                return AutoConfig.from_pretrained(
                    self.folder, trust_remote_code=False, **self.config_changes
                )
            return AutoConfig.for_model(**copy.deepcopy({**self.shape, **self.config_changes}))
        except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"{origin}: transformers cannot build this model: {reason[:160]}; "
                "set model.source to a checkpoint in transformers' format"
            ) from error

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer; the end token serves as padding token if there is none.

        Raises:
            ConfigError: the source has no checkpoint folder.
        """
        if self.folder is None:
            raise _no_tokenizer_error(self.name)
        tokenizer = tokenizer_of(self.folder, self.config if self._internvl_chat else None)
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
        return self.reader_settings.reader(
            OpenCheckpoint(self.folder, self.tokenizer, self.config, self.dtype)
        )

    def skeleton(self) -> PreTrainedModel:
        """A new model without weights: all parameters are on the meta device.

        Buffers have values, since buffers such as rotary frequencies are computed, not stored.

        Raises:
            ConfigError: the configuration does not fit the model family.
        """
        config = copy.deepcopy(self.config)  # the trainer changes the configuration of its model
        try:
            with init_empty_weights(include_buffers=False):
                model = self.auto.from_config(config, dtype=self.dtype)
        except ValueError as error:
            raise ConfigError(
                f"{self.folder or self.name}: {self.auto.__name__} cannot build a model of type "
                f"{config.model_type}; set model or model.source"
            ) from error
        if self.folder is not None and (self.folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(self.folder)
        for name in self.fresh_modules:
            compute_in_float32(model.get_submodule(name))
        return model.eval()

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
        model = self.skeleton()
        model.tie_weights()
        return model

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

    def read(self, names: list[str], device: torch.device = CPU) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) of the named tensors, one at a time, in the source's dtype.

        Stored tensors come in the order of the files and are read straight to `device`. The
        generator keeps no reference to a tensor while it reads the next one.

        Raises:
            ConfigError: a tensor is missing.
        """
        self.require(names)
        fresh_names = [name for name in names if self._is_fresh(name)]
        stored_names = [name for name in names if name not in fresh_names] if fresh_names else names
        for name, tensor in self.weights.read(stored_names, device):
            tensor = tensor.to(self.dtype)
            yield name, tensor
            del tensor  # otherwise this variable keeps the memory while the next tensor is read
        yield from self._draw(FRESH_SEED, fresh_names, device)

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

    def fill(self, model: nn.Module, names: Iterable[str], device: torch.device) -> None:
        """Load the named parameters of `model` to `device`, and move the model's buffers there.

        Parameters that the weights do not contain are left as they are.
        """
        stored_names = self.weights.names
        available = [name for name in names if name in stored_names or self._is_fresh(name)]
        for name, tensor in self.read(available, device):
            replace_parameter(model, name, tensor)
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
        self.fill(model, [n for n, p in model.named_parameters() if p.is_meta], device)
        model.tie_weights()
        self.require([name for name, parameter in model.named_parameters() if parameter.is_meta])
        return model.to(device).requires_grad_(False)

    def redraw_fresh_modules(self, model: nn.Module, seed: int) -> None:
        """Draw new weights from `seed` for the fresh modules of `model`; no parameter is moved."""
        names = [name for name in self.sizes if self._is_fresh(name)]
        for name, tensor in self._draw(seed, names, CPU):
            replace_parameter(model, name, tensor.to(model.get_parameter(name).device))

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
