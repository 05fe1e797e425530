"""Tied parameters, such as an output head that is the token embedding."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig, PreTrainedModel

from emloc.models.checkpoint.weights import SafetensorsWeights

_CPU = torch.device("cpu")


def is_stored_untied(
    model: PreTrainedModel, weights: SafetensorsWeights, dtype: torch.dtype
) -> bool:
    """Whether two parameters that the configuration ties are stored with different values.

    `from_pretrained` does not tie these, either.

    Args:
        model: on the meta device, as the configuration describes it.
        weights: the files of the checkpoint.
        dtype: of the loaded parameters.

    Raises:
        ConfigError: the weights cannot be read.
    """
    pairs = model.get_expanded_tied_weights_keys(all_submodels=True).items()
    for pair in pairs:
        if not weights.origins.keys() >= set(pair):
            continue
        origins = [weights.origins[name].inputs for name in pair]
        if origins[0] == origins[1]:
            continue
        one, other = (tensor.to(dtype) for _, tensor in weights.read(list(pair), _CPU))
        if not torch.equal(one, other):
            return True
    return False


def untied(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of the model with separate parameters: `config`, changed in place."""
    for part in (config, config.get_text_config(decoder=True)):
        part.tie_word_embeddings = False
    return config
