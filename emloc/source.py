"""The original model as a checkpoint on disk: read tensor by tensor, no more than is asked for."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from emloc.errors import ConfigError
from emloc.nn.surgery import put


@dataclass(frozen=True)
class Source:
    """A causal language model in a folder of safetensors.

    `name` is what an adapter's `base_model_name_or_path` says; `identity` names the content of the
    folder, so that the key changes when the weights do.
    """

    folder: Path
    name: str
    identity: str
    dtype: torch.dtype

    @property
    def key(self) -> list[str]:
        """What a stage that reads this model depends on."""
        return [self.identity, str(self.dtype)]

    @cached_property
    def files(self) -> dict[str, Path]:
        """Tensor name -> the file that holds it.

        Raises:
            ConfigError: no safetensors in the folder, or a shard is missing.
        """
        index = self.folder / "model.safetensors.index.json"
        single = self.folder / "model.safetensors"
        if index.exists():
            names: dict[str, str] = json.loads(index.read_text())["weight_map"]
            missing = sorted({file for file in names.values() if not (self.folder / file).exists()})
            if missing:
                raise ConfigError(f"{self.folder}: shard {missing[0]} is missing; set model.source")
            return {name: self.folder / file for name, file in names.items()}
        if not single.exists():
            raise ConfigError(f"{self.folder}: no model.safetensors; set model.source to one")
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single)

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's own configuration."""
        return AutoConfig.from_pretrained(self.folder)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with a padding token (the end token where it has none)."""
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def skeleton(self) -> PreTrainedModel:
        """The model with every parameter on the meta device: shapes and names, no weights.

        Buffers are real: rotary frequencies are computed, never stored.
        """
        config = copy.deepcopy(self.config)  # a trainer writes into its model's
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=self.dtype)
        if (self.folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(self.folder)
        return model.eval()

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Name -> (out, in) of every `nn.Linear`, in the order of the model."""
        return {
            name: (module.out_features, module.in_features)
            for name, module in self._bare.named_modules()
            if isinstance(module, nn.Linear)
        }

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Parameter name -> number of elements, tied parameters once."""
        return {name: parameter.numel() for name, parameter in self._bare.named_parameters()}

    @cached_property
    def _bare(self) -> PreTrainedModel:
        """A skeleton that is only looked at: names, shapes and which parameters are tied."""
        model = self.skeleton()
        model.tie_weights()
        return model

    def require(self, names: list[str]) -> None:
        """Refuse a checkpoint without one of the named tensors.

        Raises:
            ConfigError: it does not hold one of them.
        """
        missing = [name for name in names if name not in self.files]
        if missing:
            raise ConfigError(f"{self.folder}: holds no tensor {missing[0]}; set model.source")

    def read(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """The named tensors in the source's dtype, file by file, each file closed after its last.

        Raises:
            ConfigError: the checkpoint does not hold one of them.
        """
        self.require(names)
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.files[name], []).append(name)
        for path, members in by_file.items():
            with safe_open(path, framework="pt") as file:
                for name in members:
                    yield name, file.get_tensor(name).to(self.dtype)

    def weight(self, module: str) -> Tensor:
        """The weight (out, in) of one linear."""
        return next(tensor for _, tensor in self.read([f"{module}.weight"]))

    def bias(self, module: str, device: torch.device) -> Tensor | None:
        """The bias (out,) of one linear, None where it has none."""
        name = f"{module}.bias"
        return next(self.read([name]))[1].to(device) if name in self.files else None

    def fill(self, model: nn.Module, names: Iterable[str], device: torch.device) -> None:
        """Give the named parameters their weights, and move the model's buffers, to `device`."""
        for name, tensor in self.read([name for name in names if name in self.files]):
            put(model, name, tensor.to(device))
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
