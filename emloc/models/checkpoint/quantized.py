"""Weights that are stored quantised: dequantised while they are read, or refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import transformers
from transformers import PretrainedConfig
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoQuantizationConfig

from emloc.errors import ConfigError
from emloc.models.checkpoint.bitsandbytes import Dequantizer4bit, Dequantizer8bit

log = logging.getLogger(__name__)

# The dtypes of ordinary weights, in the words of safetensors.
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
# Last parts of the names of tensors that only quantised checkpoints have.
_SCALES = frozenset(
    (
        *("absmax", "quant_map", "nested_absmax", "nested_quant_map", "SCB", "weight_format"),
        *("bitsandbytes__nf4", "bitsandbytes__fp4", "weight_scale", "weight_scale_inv"),
        *("weight_scale_2", "weight_zero_point", "weight_packed", "weight_shape", "weight_g_idx"),
        *("input_scale", "activation_scale", "scale_inv", "qscale_weight", "qweight", "qzeros"),
        *("qbiases", "scales", "g_idx", "qdata", "codes", "codebooks", "gate_up_proj_blocks"),
        *("gate_up_proj_scales", "down_proj_blocks", "down_proj_scales"),
    )
)
# Method of quantisation -> the package that its users install.
_PACKAGES = {
    "aqlm": "aqlm",
    "auto-round": "auto-round",
    "awq": "gptqmodel",
    "gptq": "gptqmodel",
    "hqq": "hqq",
    "modelopt": "nvidia-modelopt",
    "quanto": "optimum-quanto",
    "quark": "amd-quark",
    "torchao": "torchao",
    "vptq": "vptq",
}
# Packages that transformers dequantises with.
_DEQUANTIZING_PACKAGES = {"compressed-tensors": "compressed-tensors"}
_DEQUANTIZERS = {"bitsandbytes_4bit": Dequantizer4bit, "bitsandbytes_8bit": Dequantizer8bit}
_REMEDY = "set model.source to the unquantised checkpoint"
# The release of transformers that began to dequantise tensor by tensor.
_RELEASE = "5.21"


def dequantizer_of(settings: Any, folder: Path) -> Any:
    """transformers' quantizer that dequantises the weights in `folder`.

    Args:
        settings: of the quantisation, from the configuration.
        folder: of the checkpoint.

    Raises:
        ConfigError: neither transformers nor an installed package can dequantise them.
    """
    method = _method(settings)
    origin = f"{folder}: config.json: the weights are quantised by {method}"
    if not hasattr(HfQuantizer, "get_load_operations"):
        raise ConfigError(
            f"{origin}, which transformers {transformers.__version__} cannot dequantise tensor by "
            f"tensor; pip install 'transformers>={_RELEASE}', or {_REMEDY}"
        )
    try:
        quantizer = _dequantizer(method, settings)
    except (ImportError, ValueError, TypeError, KeyError, RuntimeError) as error:
        log.debug("%s: %s cannot be dequantised: %s", folder, method, error)
        quantizer = None
    if quantizer is not None:
        return quantizer
    if method in _DEQUANTIZING_PACKAGES:
        install = f"pip install {_DEQUANTIZING_PACKAGES[method]}"
        raise ConfigError(f"{origin}, and are read with its package; {install}, or {_REMEDY}")
    package = f" (package {_PACKAGES[method]})" if method in _PACKAGES else ""
    raise ConfigError(f"{origin}{package}, which transformers cannot dequantise; {_REMEDY}")


def _dequantizer(method: str, settings: Any) -> Any:
    """transformers' quantizer that dequantises; None if it has no operation for that.

    Raises:
        ImportError: a package is missing.
        ValueError, TypeError, KeyError, RuntimeError: transformers does not accept the settings.
    """
    quantizer_class = _DEQUANTIZERS.get(method, AUTO_QUANTIZER_MAPPING.get(method))
    if quantizer_class is None:
        return None
    values = settings if isinstance(settings, dict) else settings.to_dict()
    quantization = AutoQuantizationConfig.from_dict(dict(values))
    quantization.dequantize = True
    quantizer = quantizer_class(quantization, pre_quantized=True)
    if "dequantize" not in quantizer.get_load_operations():
        return None
    quantizer.validate_environment()
    return quantizer


def quantization_of(config: PretrainedConfig) -> Any:
    """The settings of the quantisation in the configuration; None if there are none."""
    return getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(decoder=True), "quantization_config", None
    )


def without_quantization(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of the dequantised model: `config`, changed in place."""
    for part in (config, config.get_text_config(decoder=True)):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config


def is_scale(stored: str) -> bool:
    """Whether only a quantised checkpoint has a tensor of this name."""
    return stored.rpartition(".")[2].rpartition(":")[2] in _SCALES


def quantized_error(path: Path, stored: str, dtype: str) -> ConfigError:
    """The error for a tensor that belongs to quantised weights without settings to read them by."""
    return ConfigError(
        f"{path}: {stored} ({dtype}) belongs to quantised weights, and config.json does not say "
        f"how to dequantise them; {_REMEDY}"
    )


def _method(settings: Any) -> str:
    """Name of the method of quantisation, as transformers' tables have it."""
    values = settings if isinstance(settings, dict) else settings.to_dict()
    if values.get("load_in_4bit") or values.get("load_in_8bit"):
        return "bitsandbytes_4bit" if values.get("load_in_4bit") else "bitsandbytes_8bit"
    return str(getattr(values.get("quant_method"), "value", values.get("quant_method")))
