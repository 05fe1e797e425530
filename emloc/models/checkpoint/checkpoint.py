"""A model's configuration and weights: in a folder, from a seed, or only a shape."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from emloc.errors import ConfigError, one_line
from emloc.models.checkpoint.files import StoredTensor, has_weight_files
from emloc.models.checkpoint.internvl_chat import InternVLChat, read_internvl_chat
from emloc.models.checkpoint.origins import Layout
from emloc.models.checkpoint.quantized import (
    dequantizer_of,
    quantization_of,
    without_quantization,
)
from emloc.models.checkpoint.random_weights import RandomWeights, random_device_type, tensor_inits
from emloc.models.checkpoint.renaming import layout_of
from emloc.models.checkpoint.state import checked_layout
from emloc.models.checkpoint.tying import is_stored_untied, untied
from emloc.models.checkpoint.weights import AbsentWeights, SafetensorsWeights, Weights
from emloc.tensors.nn.fresh import compute_in_float32


@dataclass(frozen=True)
class Checkpoint:
    """A model's configuration and the origin of its weights; see `Source` for the fields.

    The files decide on two points of the configuration: quantised weights are dequantised, and
    parameters with different values are not tied.
    """

    folder: Path | None
    name: str
    dtype: torch.dtype
    auto: Any
    shape: Mapping[str, Any]
    seed: int | None
    fresh_modules: tuple[str, ...]
    config_changes: Mapping[str, Any]

    @cached_property
    def weights(self) -> Weights:
        """The origin of the weights: safetensors files, a random generator, or none."""
        if self.seed is not None:
            inits = tensor_inits(self.declared_model)
            return RandomWeights(self.seed, inits, self.dtype, random_device_type())
        if self.folder is None:
            return AbsentWeights(self.name)
        layout = checked_layout(self._layout, self.declared_model, self.fresh_modules)
        return SafetensorsWeights(self.folder, layout)

    @cached_property
    def _layout(self) -> Layout:
        """Where a checkpoint in the format of `folder` stores parameters."""
        chat = self.internvl_chat
        return chat.layout() if chat else layout_of(self.declared_model, self._quantizer)

    def stores_by_name(self, name: str) -> bool:
        """Whether a tensor of this name in the files would be the parameter of this name."""
        tensor = StoredTensor(Path(), name, "", (), 0)
        origin = self._layout([tensor]).get(name)
        return origin is not None and getattr(origin, "part", None) is None

    @cached_property
    def internvl_chat(self) -> InternVLChat | None:
        """The checkpoint in the format of InternVL's authors; None if it has another format."""
        return None if self.folder is None else read_internvl_chat(self.folder)

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's configuration in transformers, that of the dequantised model.

        Parameters that the files store with different values are not tied.

        Raises:
            ConfigError: transformers does not implement the model or one of its settings.
        """
        config = self._declared_config
        return untied(copy.deepcopy(config)) if self.is_untied else config

    @cached_property
    def is_untied(self) -> bool:
        """Whether the files store different values for parameters that the configuration ties."""
        return (
            isinstance(self.weights, SafetensorsWeights)
            and has_weight_files(self.weights.folder)
            and is_stored_untied(self.declared_model, self.weights, self.dtype)
        )

    @cached_property
    def _quantizer(self) -> Any:
        """transformers' quantizer that dequantises the files; None if they hold plain weights."""
        settings = quantization_of(self._stored_config)
        if self.folder is None or settings is None:
            return None
        return dequantizer_of(settings, self.folder)

    @cached_property
    def _declared_config(self) -> PretrainedConfig:
        """The configuration in the files, without the settings of a quantisation."""
        return without_quantization(copy.deepcopy(self._stored_config))

    @cached_property
    def _stored_config(self) -> PretrainedConfig:
        """The configuration in the files.

        Raises:
            ConfigError: transformers does not implement the model or one of its settings.
        """
        origin = "model.shape" if self.folder is None else f"{self.folder}: config.json"
        chat_shape = None if self.internvl_chat is None else self.internvl_chat.shape()
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
            reason = one_line(error)
            raise ConfigError(
                f"{origin}: transformers cannot build this model: {reason[:160]}; "
                "set model.source to a checkpoint in transformers' format"
            ) from error

    @cached_property
    def declared_model(self) -> PreTrainedModel:
        """The model of the configuration in the files, without weights; never changed."""
        model = self.new_model(self._declared_config)
        model.tie_weights()
        return model

    def new_model(self, config: PretrainedConfig) -> PreTrainedModel:
        """A new model of this configuration, with all parameters on the meta device.

        Raises:
            ConfigError: the configuration does not fit the model family.
        """
        config = copy.deepcopy(config)  # the trainer changes the configuration of its model
        try:
            # Random numbers on the meta device would take most of the time.
            with init_empty_weights(include_buffers=False), no_init_weights():
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
