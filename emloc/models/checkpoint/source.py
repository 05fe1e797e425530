"""The original model: what it is, and its weights tensor by tensor, no more than is asked for."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

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

from emloc.data.reader import OpenCheckpoint, Reader, ReaderSettings, TextReaderSettings
from emloc.errors import ConfigError
from emloc.models.checkpoint.internvl_chat import InternVLChat, read_internvl_chat
from emloc.models.checkpoint.tokenizer import tokenizer_of
from emloc.models.checkpoint.weights import (
    AbsentWeights,
    RandomWeights,
    SafetensorsWeights,
    Weights,
    draws_of,
    layout_of,
    random_home,
)
from emloc.models.objectives import Objective
from emloc.models.objectives.tokens import Tokens
from emloc.runtime.digest import digest
from emloc.tensors.nn.fresh import compute_in_float32
from emloc.tensors.nn.surgery import replace_parameter

CPU = torch.device("cpu")
# What a fresh module starts with until a training draws it anew from its own seed.
FRESH_SEED = 0


@dataclass(frozen=True)
class Source:
    """A model: its configuration and class, and where its weights are read from.

    `name` is what an adapter's `base_model_name_or_path` says; `identity` names the content of the
    weights, so that the key changes when they do.
    """

    folder: Path | None  # of configuration, tokenizer and safetensors; None: only `shape` is known
    name: str
    identity: str
    dtype: torch.dtype
    auto: Any = AutoModelForCausalLM  # the transformers class that knows which model to build
    shape: Mapping[str, Any] = field(default_factory=dict)  # the configuration without a folder
    seed: int | None = None  # of random weights; None: those in the folder
    reader_settings: ReaderSettings = field(
        default_factory=TextReaderSettings
    )  # how it reads examples
    objective: Objective = field(default_factory=Tokens)  # what it learns, and how it is scored
    # Names of modules that are made new, whatever the checkpoint holds, and trained whole.
    fresh: tuple[str, ...] = ()
    # Values of the configuration that differ from the checkpoint's, as the number of classes.
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> list[str]:
        """What a stage that reads this model depends on."""
        family = [*self.reader_settings.key, *self.objective.key]
        own = [*self.fresh, digest(dict(self.changes))] if self.fresh or self.changes else []
        return [self.identity, str(self.dtype), self.auto.__name__, *family, *own]

    @cached_property
    def weights(self) -> Weights:
        """Where the tensors come from."""
        if self.seed is not None:
            return RandomWeights(self.seed, draws_of(self.bare), self.dtype, random_home())
        if self.folder is None:
            return AbsentWeights(self.name)
        chat = self._chat
        return SafetensorsWeights(self.folder, chat.layout() if chat else layout_of(self.bare))

    @cached_property
    def _chat(self) -> InternVLChat | None:
        """The checkpoint, where it is in the format of InternVL's authors."""
        return None if self.folder is None else read_internvl_chat(self.folder)

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's own configuration.

        Raises:
            ConfigError: transformers has no such model, or the model no such setting.
        """
        where = "model.shape" if self.folder is None else f"{self.folder}: config.json"
        chat = None if self._chat is None else self._chat.shape()
        try:
            if chat is not None:
                return AutoConfig.for_model(**chat)
            if self.folder is not None:
                # Never code from a checkpoint; left unset, transformers asks on the terminal.
                return AutoConfig.from_pretrained(
                    self.folder, trust_remote_code=False, **self.changes
                )
            return AutoConfig.for_model(**copy.deepcopy({**self.shape, **self.changes}))
        except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"{where} is of no model that transformers builds by itself: {reason[:160]}; "
                "set model.source to a checkpoint in its format"
            ) from error

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with a padding token (the end token where it has none).

        Raises:
            ConfigError: there is no folder it could lie in.
        """
        if self.folder is None:
            raise _unread(self.name)
        tokenizer = tokenizer_of(self.folder, self.config if self._chat else None)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def reader(self) -> Reader:
        """What turns examples into rows and batches, opened once: take it as it is.

        Raises:
            ConfigError: there is no folder, or the checkpoint is of another kind than its settings.
        """
        return self._reader

    @cached_property
    def _reader(self) -> Reader:
        if self.folder is None:
            raise _unread(self.name)
        return self.reader_settings.reader(
            OpenCheckpoint(self.folder, self.tokenizer, self.config, self.dtype)
        )

    def skeleton(self) -> PreTrainedModel:
        """The model with every parameter on the meta device: shapes and names, no weights.

        Buffers are real: rotary frequencies are computed, never stored.

        Raises:
            ConfigError: the configuration is of another kind of model.
        """
        config = copy.deepcopy(self.config)  # a trainer writes into its model's
        try:
            with init_empty_weights(include_buffers=False):
                model = self.auto.from_config(config, dtype=self.dtype)
        except ValueError as error:
            raise ConfigError(
                f"{self.folder or self.name}: a model of type {config.model_type} is none of "
                f"{self.auto.__name__}; set model or model.source"
            ) from error
        if self.folder is not None and (self.folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(self.folder)
        for name in self.fresh:
            compute_in_float32(model.get_submodule(name))
        return model.eval()

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Name -> (out, in) of every `nn.Linear`, in the order of the model."""
        return {
            name: (module.out_features, module.in_features)
            for name, module in self.bare.named_modules()
            if isinstance(module, nn.Linear)
        }

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Parameter name -> number of elements, tied parameters once."""
        return {name: parameter.numel() for name, parameter in self.bare.named_parameters()}

    @cached_property
    def bare(self) -> PreTrainedModel:
        """A skeleton that is only looked at: names, shapes and which parameters are tied."""
        model = self.skeleton()
        model.tie_weights()
        return model

    def require(self, names: list[str]) -> None:
        """Refuse weights without one of the named tensors.

        Raises:
            ConfigError: one of them is not there.
        """
        missing = [
            name for name in names if name not in self.weights.names and not self._is_fresh(name)
        ]
        if missing:
            raise ConfigError(
                f"{self.weights.where}: holds no tensor {missing[0]}; set model.source"
            )

    def read(self, names: list[str], device: torch.device = CPU) -> Iterator[tuple[str, Tensor]]:
        """The named tensors in the source's dtype, one at a time, straight to `device`.

        The order is that of the files. Each tensor is let go before the next is read.

        Raises:
            ConfigError: one of them is not there.
        """
        self.require(names)
        fresh = [name for name in names if self._is_fresh(name)]
        stored = [name for name in names if name not in fresh] if fresh else names
        for name, tensor in self.weights.read(stored, device):
            tensor = tensor.to(self.dtype)
            yield name, tensor
            del tensor  # or it would be held, for whoever wants it no more, through the next read
        yield from self._draw(FRESH_SEED, fresh, device)

    def weight(self, module: str, device: torch.device = CPU) -> Tensor:
        """The weight (out, in) of one linear."""
        [(_, tensor)] = self.read([f"{module}.weight"], device)
        return tensor

    def bias(self, module: str, device: torch.device = CPU) -> Tensor | None:
        """The bias (out,) of one linear, None where it has none."""
        name = f"{module}.bias"
        if name not in self.weights.names:
            return None
        [(_, tensor)] = self.read([name], device)
        return tensor

    def fill(self, model: nn.Module, names: Iterable[str], device: torch.device) -> None:
        """Give the named parameters their weights, and move the model's buffers, to `device`."""
        held = self.weights.names
        given = [name for name in names if name in held or self._is_fresh(name)]
        for name, tensor in self.read(given, device):
            replace_parameter(model, name, tensor)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.device != device and not buffer.is_meta:
                    setattr(module, name, buffer.to(device))

    def load(
        self, device: torch.device, replace: Mapping[str, nn.Module] | None = None
    ) -> PreTrainedModel:
        """The model on `device`, with the modules named in `replace` in place of its own.

        What is replaced is never read. The replacements carry their weights.

        Raises:
            ConfigError: the checkpoint leaves a parameter without weights.
        """
        model = self.skeleton()
        for name, module in (replace or {}).items():
            model.set_submodule(name, module)
        self.fill(model, [n for n, p in model.named_parameters() if p.is_meta], device)
        model.tie_weights()
        self.require([name for name, parameter in model.named_parameters() if parameter.is_meta])
        return model.to(device).requires_grad_(False)

    def renew(self, model: nn.Module, seed: int) -> None:
        """Draw the fresh modules of `model` again, from `seed`, each parameter where it is."""
        names = [name for name in self.sizes if self._is_fresh(name)]
        for name, tensor in self._draw(seed, names, CPU):
            replace_parameter(model, name, tensor.to(model.get_parameter(name).device))

    def _is_fresh(self, parameter: str) -> bool:
        return parameter.startswith(tuple(f"{name}." for name in self.fresh))

    def _draw(
        self, seed: int, names: Sequence[str], device: torch.device
    ) -> Iterator[tuple[str, Tensor]]:
        """Parameters of fresh modules, in float32; the same numbers on every kind of device."""
        if names:
            draws = draws_of(self.bare)
            yield from RandomWeights(seed, draws, torch.float32, "cpu").read(list(names), device)


def _unread(name: str) -> ConfigError:
    return ConfigError(
        f"{name}: without a checkpoint there is no tokenizer; set model.source=/path/to/checkpoint"
    )
