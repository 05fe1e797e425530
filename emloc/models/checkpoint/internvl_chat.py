"""Read InternVL checkpoints in the authors' format (`internvl_chat`) as transformers' InternVL.

Such a checkpoint brings Python code, which is never run. Instead, its settings are translated into
a transformers configuration, and its tensors are renamed and split into the parameters of
transformers' model. The authors' code is in OpenGVLab/InternVL: `modeling_internvl_chat.py`,
`modeling_intern_vit.py`, `modeling_internlm2.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emloc.errors import ConfigError
from emloc.models.checkpoint.fused_tensors import TensorSlice
from emloc.models.checkpoint.origins import Layout, layout_by_name
from emloc.models.checkpoint.tokenizer import added_tokens

FORMAT = "internvl_chat"
IMAGE_TOKEN = "<IMG_CONTEXT>"

# Settings of the authors' format with the only value that transformers' InternVL implements.
_REQUIRED_SETTINGS = {
    "select_layer": -1,
    "ps_version": "v2",
    "pad2square": False,
    "use_backbone_lora": 0,
    "use_llm_lora": 0,
    # How images are cut into tiles; `emloc.models.internvl` implements only these values.
    "dynamic_image_size": True,
    "min_dynamic_patch": 1,
    "use_thumbnail": True,
}
# Architecture of the language model -> its `model_type` in transformers.
_LANGUAGE_MODEL_TYPES = {
    "InternLM2ForCausalLM": "llama",  # differs by a fused projection and by parameter names
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
}
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_TEXT_SIZES = (*_SIZES, "vocab_size", "num_key_value_heads", "max_position_embeddings")
_TEXT_SETTINGS = (
    "hidden_act",
    "initializer_range",
    "rms_norm_eps",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
)
# Authors' name of a setting -> transformers' name and the authors' default. `drop_path_rate` is
# left out: it skips layers at random in training, and the vision tower is frozen here.
_VISION_SETTINGS: dict[str, tuple[str, Any]] = {
    "num_channels": ("num_channels", 3),
    "hidden_act": ("hidden_act", "gelu"),
    "norm_type": ("norm_type", "rms_norm"),
    "layer_norm_eps": ("layer_norm_eps", 1e-6),
    "qkv_bias": ("attention_bias", False),
    "qk_normalization": ("use_qk_norm", True),
    "initializer_range": ("initializer_range", 0.02),
    "initializer_factor": ("layer_scale_init_value", 0.1),
    "attention_dropout": ("attention_dropout", 0.0),
    "dropout": ("projection_dropout", 0.0),
}
# Epsilon of the query and key norms in transformers' model, which ignores `layer_norm_eps` there.
_QK_NORM_EPS = 1e-6

_VISION = "model.vision_tower.encoder.layer"
_DECODER = "model.language_model.layers"
# Regular expression on an authors' tensor name -> its replacement; all are applied in this order.
_RENAMINGS = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^vision_model\.embeddings\.class_embedding$", "vision_tower.embeddings.cls_token"),
        (r"^vision_model\.embeddings\.(position_embedding)$", r"vision_tower.embeddings.\1s"),
        (
            r"^vision_model\.embeddings\.patch_embedding\.",
            "vision_tower.embeddings.patch_embeddings.projection.",
        ),
        (r"^vision_model\.encoder\.layers\.", "vision_tower.encoder.layer."),
        (r"^mlp1\.0\.", "multi_modal_projector.layer_norm."),
        (r"^mlp1\.1\.", "multi_modal_projector.linear_1."),
        (r"^mlp1\.3\.", "multi_modal_projector.linear_2."),
        (r"^language_model\.(lm_head|output)\.", "lm_head."),
        (r"^language_model\.model\.tok_embeddings\.", "language_model.embed_tokens."),
        (r"^language_model\.model\.", "language_model."),
        (r"^(vision_tower|multi_modal_projector|language_model)\.", r"model.\1."),
        (rf"^({_VISION}\.\d+)\.attn\.proj\.", r"\1.attention.projection_layer."),
        (rf"^({_VISION}\.\d+)\.attn\.", r"\1.attention."),
        (rf"^({_VISION}\.\d+)\.norm1\.", r"\1.layernorm_before."),
        (rf"^({_VISION}\.\d+)\.norm2\.", r"\1.layernorm_after."),
        (rf"^({_VISION}\.\d+)\.ls(\d)$", r"\1.lambda_\2"),
        (rf"^({_DECODER}\.\d+)\.attention\.wqkv\.", r"\1.self_attn.wqkv."),
        (rf"^({_DECODER}\.\d+)\.attention\.wo\.", r"\1.self_attn.o_proj."),
        (rf"^({_DECODER}\.\d+)\.feed_forward\.w1\.", r"\1.mlp.gate_proj."),
        (rf"^({_DECODER}\.\d+)\.feed_forward\.w2\.", r"\1.mlp.down_proj."),
        (rf"^({_DECODER}\.\d+)\.feed_forward\.w3\.", r"\1.mlp.up_proj."),
        (rf"^({_DECODER}\.\d+)\.attention_norm\.", r"\1.input_layernorm."),
        (rf"^({_DECODER}\.\d+)\.ffn_norm\.", r"\1.post_attention_layernorm."),
    )
)
_FUSED = re.compile(r"(.+)\.(qkv|wqkv)\.(weight|bias)")


@dataclass(frozen=True)
class ChatLayout:
    """Maps each tensor of the authors' files to the parameters of transformers' InternVL.

    The vision tower's `qkv` holds all queries, then all keys, then all values. InternLM2's `wqkv`
    holds, for each key/value head, its `groups` query heads, then its keys, then its values. Rows
    need no permutation: both models apply the rotary embedding to the two halves of a head, as
    Llama in transformers does.
    """

    groups: int  # query heads per key/value head
    key_value_heads: int

    def __call__(self, stored: str) -> dict[str, TensorSlice | None]:
        """Parameter name -> its rows in the tensor `stored`; None stands for all rows."""
        name = stored
        for pattern, replacement in _RENAMINGS:
            name = pattern.sub(replacement, name)
        fused = _FUSED.fullmatch(name)
        if fused is None:
            return {name: None}
        module, kind, leaf = fused.groups()
        blocks, groups = (1, 1) if kind == "qkv" else (self.key_value_heads, self.groups)
        shares = {"q": (0, groups), "k": (groups, groups + 1), "v": (groups + 1, groups + 2)}
        return {
            f"{module}.{letter}_proj.{leaf}": TensorSlice(blocks, groups + 2, start, stop)
            for letter, (start, stop) in shares.items()
        }


@dataclass(frozen=True)
class InternVLChat:
    """A checkpoint in the authors' format: its folder and the content of its config.json."""

    folder: Path
    settings: Mapping[str, Any]

    def layout(self) -> Layout:
        """The mapping from stored tensors to parameters.

        Raises:
            ConfigError: a size is missing, or the key/value heads do not divide the query heads.
        """
        text = self._section("llm_config", _TEXT_SIZES)
        heads, key_value_heads = text["num_attention_heads"], text["num_key_value_heads"]
        if heads % key_value_heads:
            raise self._error(
                f"{heads} attention heads are not divisible by {key_value_heads} key/value heads"
            )
        return layout_by_name(ChatLayout(heads // key_value_heads, key_value_heads))

    def shape(self) -> dict[str, Any]:
        """The settings as a transformers InternVL configuration, with `model_type`.

        Raises:
            ConfigError: transformers' model does not implement a setting, or the tokenizer has no
                image token.
        """
        for key, value in _REQUIRED_SETTINGS.items():
            # The authors' default of a missing setting: only that of `ps_version` is unsupported.
            setting = self.settings.get(key, "v1" if key == "ps_version" else value)
            if setting != value:
                raise self._error(f"{key}={setting} is not supported, only {value}")
        vision, text = self._vision_config(), self._text_config()
        ratio = float(self.settings.get("downsample_ratio", 0.5))
        side = vision["image_size"] // vision["patch_size"]
        return {
            "model_type": "internvl",
            "image_token_id": self._image_token(),
            "image_seq_length": int(side**2 * ratio**2),
            "downsample_ratio": ratio,
            "tie_word_embeddings": text["tie_word_embeddings"],
            "vision_config": vision,
            "text_config": text,
        }

    def _vision_config(self) -> dict[str, Any]:
        """Transformers' configuration of the vision tower."""
        section = self._section("vision_config", (*_SIZES, "image_size", "patch_size"))
        size, forced_size = section["image_size"], self.settings.get("force_image_size")
        if forced_size not in (None, size):
            raise self._error(
                f"force_image_size={forced_size} differs from vision_config.image_size={size}"
            )
        config = {key: section[key] for key in (*_SIZES, "image_size", "patch_size")} | {
            name: section.get(key, default) for key, (name, default) in _VISION_SETTINGS.items()
        }
        if config["use_qk_norm"] and config["layer_norm_eps"] != _QK_NORM_EPS:
            raise self._error(
                f"layer_norm_eps={config['layer_norm_eps']} with qk_normalization is not "
                f"supported, only {_QK_NORM_EPS}"
            )
        return {"model_type": "internvl_vision"} | config

    def _text_config(self) -> dict[str, Any]:
        """Transformers' configuration of the language model."""
        section = self._section("llm_config", _TEXT_SIZES)
        architecture = next(iter(section.get("architectures") or []), None)
        if architecture not in _LANGUAGE_MODEL_TYPES:
            supported = ", ".join(_LANGUAGE_MODEL_TYPES)
            raise self._error(
                f"the language model {architecture} is not supported, only {supported}"
            )
        config = {key: section[key] for key in (*_TEXT_SIZES, *_TEXT_SETTINGS) if key in section}
        scaling = dict(section.get("rope_scaling") or {})
        rope = {"rope_type": scaling.pop("type", scaling.pop("rope_type", "default"))} | scaling
        config["rope_parameters"] = rope | {"rope_theta": section.get("rope_theta", 10000.0)}
        config["tie_word_embeddings"] = section.get("tie_word_embeddings", False)
        if architecture == "InternLM2ForCausalLM":
            config["attention_bias"] = section.get("bias", True)
        elif architecture == "LlamaForCausalLM":
            config["attention_bias"] = section.get("attention_bias", False)
        return {"model_type": _LANGUAGE_MODEL_TYPES[architecture]} | config

    def _section(self, key: str, required: tuple[str, ...]) -> Mapping[str, Any]:
        """The section `key` of config.json, after a check that it has the `required` settings."""
        section: Mapping[str, Any] = self.settings.get(key) or {}
        missing = [name for name in required if section.get(name) is None]
        if missing:
            raise self._error(f"{key} has no {missing[0]}")
        return section

    def _image_token(self) -> int:
        """Id of the token that stands for an image patch in a prompt."""
        token_id = added_tokens(self.folder).get(IMAGE_TOKEN)
        if token_id is None:
            raise ConfigError(
                f"{self.folder}: no tokenizer file has the token {IMAGE_TOKEN}; "
                "set model.source to a folder with the checkpoint's tokenizer"
            )
        return token_id

    def _error(self, reason: str) -> ConfigError:
        """An error about this checkpoint's config.json."""
        return ConfigError(
            f"{self.folder}: config.json: {reason}; set model.source to another checkpoint"
        )


def read_internvl_chat(folder: Path) -> InternVLChat | None:
    """The checkpoint in `folder`; None if it has another format."""
    path = folder / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return InternVLChat(folder, settings) if settings.get("model_type") == FORMAT else None
