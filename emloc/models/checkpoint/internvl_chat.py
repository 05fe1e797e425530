"""InternVL checkpoints in the authors' own format, read as transformers' InternVL.

Their config.json says `internvl_chat` and names code to be run from the checkpoint, which is never
run: settings are put into transformers' words, and the tensors' names and parts into its modules
(OpenGVLab/InternVL, `modeling_internvl_chat.py`, `modeling_intern_vit.py`,
`modeling_internlm2.py`).
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
from emloc.models.checkpoint.tokenizer import added_tokens

FORMAT = "internvl_chat"
IMAGE_TOKEN = "<IMG_CONTEXT>"

# What transformers' InternVL does, and the authors' code does only where its settings say so.
_FIXED = {
    "select_layer": -1,
    "ps_version": "v2",
    "pad2square": False,
    "use_backbone_lora": 0,
    "use_llm_lora": 0,
    # How images are cut up, which emloc.models.internvl does in this one way.
    "dynamic_image_size": True,
    "min_dynamic_patch": 1,
    "use_thumbnail": True,
}
_LANGUAGE = {
    "InternLM2ForCausalLM": "llama",  # but for its fused projection, and for its names
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
# Theirs -> transformers', with the authors' defaults. `drop_path_rate` skips whole layers in
# training: a frozen tower has none of it.
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
# The norms of queries and keys in transformers take no other, whatever `layer_norm_eps` says.
_QK_NORM_EPS = 1e-6

_VISION = "model.vision_tower.encoder.layer"
_DECODER = "model.language_model.layers"
_RENAMED = tuple(
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
    """What the authors' tensors hold, for a language model with that many heads.

    The vision tower's `qkv` is queries, keys and values one after the other. InternLM2's `wqkv` has
    for each key/value head its `groups` query heads, then its keys, then its values. Rows are not
    permuted: both rotate the two halves of a head, as Llama in transformers does.
    """

    groups: int  # query heads to a key/value head
    key_value_heads: int

    def __call__(self, stored: str) -> dict[str, TensorSlice | None]:
        """Parameter -> its part of the tensor `stored`, None where that is all of it."""
        name = stored
        for pattern, replacement in _RENAMED:
            name = pattern.sub(replacement, name)
        fused = _FUSED.fullmatch(name)
        if fused is None:
            return {name: None}
        module, kind, leaf = fused.groups()
        blocks, groups = (1, 1) if kind == "qkv" else (self.key_value_heads, self.groups)
        shares = {"q": (0, groups), "k": (groups, groups + 1), "v": (groups + 1, groups + 2)}
        return {
            f"{module}.{which}_proj.{leaf}": TensorSlice(blocks, groups + 2, start, stop)
            for which, (start, stop) in shares.items()
        }


@dataclass(frozen=True)
class InternVLChat:
    """A checkpoint in the authors' format: its folder, and what its config.json says."""

    folder: Path
    settings: Mapping[str, Any]

    def layout(self) -> ChatLayout:
        """What its tensors hold.

        Raises:
            ConfigError: the numbers of heads are not there, or do not divide.
        """
        text = self._half("llm_config", _TEXT_SIZES)
        heads, key_value_heads = text["num_attention_heads"], text["num_key_value_heads"]
        if heads % key_value_heads:
            raise self._refusal(f"{heads} heads are not shared by {key_value_heads} equally")
        return ChatLayout(heads // key_value_heads, key_value_heads)

    def shape(self) -> dict[str, Any]:
        """Its settings as those of transformers' InternVL, `model_type` included.

        Raises:
            ConfigError: transformers' model does something else than these settings ask for, or
                the tokenizer has no token that stands for an image.
        """
        for key, value in _FIXED.items():
            # What is left out has the authors' default, which for `ps_version` is the other one.
            found = self.settings.get(key, "v1" if key == "ps_version" else value)
            if found != value:
                raise self._refusal(f"{key}={found}, and only {value} can be read")
        vision, text = self._vision(), self._text()
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

    def _vision(self) -> dict[str, Any]:
        theirs = self._half("vision_config", (*_SIZES, "image_size", "patch_size"))
        size, forced = theirs["image_size"], self.settings.get("force_image_size")
        if forced not in (None, size):
            raise self._refusal(f"force_image_size={forced} is not the vision tower's {size}")
        shape = {key: theirs[key] for key in (*_SIZES, "image_size", "patch_size")} | {
            name: theirs.get(key, default) for key, (name, default) in _VISION_SETTINGS.items()
        }
        if shape["use_qk_norm"] and shape["layer_norm_eps"] != _QK_NORM_EPS:
            raise self._refusal(
                f"layer_norm_eps={shape['layer_norm_eps']} with qk_normalization, "
                f"and only {_QK_NORM_EPS} can be read"
            )
        return {"model_type": "internvl_vision"} | shape

    def _text(self) -> dict[str, Any]:
        theirs = self._half("llm_config", _TEXT_SIZES)
        kind = next(iter(theirs.get("architectures") or []), None)
        if kind not in _LANGUAGE:
            known = ", ".join(_LANGUAGE)
            raise self._refusal(f"a language model of {kind}, and only {known} can be read")
        shape = {key: theirs[key] for key in (*_TEXT_SIZES, *_TEXT_SETTINGS) if key in theirs}
        scaling = dict(theirs.get("rope_scaling") or {})
        rope = {"rope_type": scaling.pop("type", scaling.pop("rope_type", "default"))} | scaling
        shape["rope_parameters"] = rope | {"rope_theta": theirs.get("rope_theta", 10000.0)}
        shape["tie_word_embeddings"] = theirs.get("tie_word_embeddings", False)
        if kind == "InternLM2ForCausalLM":
            shape["attention_bias"] = theirs.get("bias", True)
        elif kind == "LlamaForCausalLM":
            shape["attention_bias"] = theirs.get("attention_bias", False)
        return {"model_type": _LANGUAGE[kind]} | shape

    def _half(self, key: str, needed: tuple[str, ...]) -> Mapping[str, Any]:
        half: Mapping[str, Any] = self.settings.get(key) or {}
        missing = [name for name in needed if half.get(name) is None]
        if missing:
            raise self._refusal(f"{key} has no {missing[0]}")
        return half

    def _image_token(self) -> int:
        found = added_tokens(self.folder).get(IMAGE_TOKEN)
        if found is None:
            raise ConfigError(
                f"{self.folder}: no tokenizer file there has the token {IMAGE_TOKEN}; "
                "set model.source to a folder with its tokenizer"
            )
        return found

    def _refusal(self, reason: str) -> ConfigError:
        return ConfigError(
            f"{self.folder}: config.json: {reason}; set model.source to another checkpoint"
        )


def read_internvl_chat(folder: Path) -> InternVLChat | None:
    """The checkpoint in `folder`, None where it is of another format."""
    path = folder / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return InternVLChat(folder, settings) if settings.get("model_type") == FORMAT else None
