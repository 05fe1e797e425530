"""Tiny random models of many families of transformers, written as `save_pretrained` writes them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

VOCABULARY = 268
BLOCKS = {"num_hidden_layers": 2, "num_attention_heads": 4}
WIDTHS = {"hidden_size": 32, "intermediate_size": 48}
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA: dict[str, Any] = {
    **TOKENS,
    **WIDTHS,
    **BLOCKS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
HEADS = {"head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
BLOOM = {**TOKENS, "hidden_size": 32, "n_layer": 2, "n_head": 4}
GEMMA4 = (
    LLAMA
    | HEADS
    | {"sliding_window": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 8}
    | {"vocab_size_per_layer_input": VOCABULARY}
)
GPT2 = {**TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}

# Model type -> its configuration; `AutoModelForCausalLM` builds the models.
TEXT: dict[str, dict[str, Any]] = {
    "apertus": LLAMA,
    "arcee": LLAMA,
    "bloom": BLOOM,
    "cohere": LLAMA,
    "cohere2": LLAMA | HEADS,
    "exaone4": LLAMA,
    "falcon": {**TOKENS, **BLOCKS, "hidden_size": 32, "tie_word_embeddings": False},
    "gemma": LLAMA | HEADS,
    "gemma2": LLAMA | HEADS | {"sliding_window": 8},
    "gemma3_text": LLAMA | HEADS | {"sliding_window": 8},
    "gemma4_text": GEMMA4,
    "glm": LLAMA | HEADS,
    "glm4": LLAMA | HEADS,
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gpt_neo": {**TOKENS, "hidden_size": 32, "num_layers": 2, "num_heads": 4}
    | {"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 256},
    "gpt_neox": LLAMA | {"rotary_pct": 0.5},
    "gpt_oss": LLAMA | HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gptj": GPT2 | {"rotary_dim": 4},
    "granite": LLAMA,
    "helium": LLAMA | HEADS,
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": LLAMA | {"num_local_experts": 4},
    "mpt": {**TOKENS, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256},
    "nemotron": LLAMA,
    "olmo": LLAMA,
    "olmo2": LLAMA,
    "olmo3": LLAMA,
    "olmoe": LLAMA | EXPERTS,
    "opt": {**TOKENS, **BLOCKS, "hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32}
    | {"max_position_embeddings": 256},
    "persimmon": LLAMA,
    "phi": LLAMA,
    "phi3": LLAMA,
    "qwen2": LLAMA,
    "qwen2_moe": LLAMA | EXPERTS | {"shared_expert_intermediate_size": 24},
    "qwen3": LLAMA | HEADS,
    "qwen3_moe": LLAMA | HEADS | EXPERTS,
    "seed_oss": LLAMA | HEADS,
    "smollm3": LLAMA,
    "stablelm": LLAMA,
    "starcoder2": LLAMA,
    "xglm": {**TOKENS, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4}
    | {"max_position_embeddings": 256},
}
IMAGE = 260
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
IMAGE_TOKENS = {"image_token_id": IMAGE}
QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": 7, "spatial_merge_size": 2} | {
    "temporal_patch_size": 1
}
QWEN_TEXT = LLAMA | {
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
}
QWEN_IDS = (
    IMAGE_TOKENS
    | {"video_token_id": 261, "vision_start_token_id": 262}
    | {
        "vision_end_token_id": 263,
        "tie_word_embeddings": False,
    }
)

# Model type -> its configuration; `AutoModelForImageTextToText` builds the models.
WITH_IMAGES: dict[str, dict[str, Any]] = {
    "aya_vision": IMAGE_TOKENS
    | {"vision_config": {"model_type": "siglip_vision_model"} | VISION}
    | {"text_config": {"model_type": "cohere2"} | LLAMA | HEADS, "downsample_factor": 2},
    "gemma3": {"image_token_index": IMAGE, "boi_token_index": 261, "eoi_token_index": 262}
    | {"mm_tokens_per_image": 4}
    | {"vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False} | VISION}
    | {"text_config": {"model_type": "gemma3_text", "sliding_window": 8} | LLAMA | HEADS},
    "gemma4": IMAGE_TOKENS
    | {"audio_config": None, "video_token_id": 261, "boi_token_id": 262, "eoi_token_id": 263}
    | {"audio_token_id": 264, "tie_word_embeddings": False}
    | {"text_config": {"model_type": "gemma4_text"} | GEMMA4}
    | {
        "vision_config": VISION
        | {"num_key_value_heads": 2, "head_dim": 8, "pooling_kernel_size": 2}
        | {"position_embedding_size": 16, "use_clipped_linears": True, "standardize": True}
    },
    "idefics3": IMAGE_TOKENS
    | {"scale_factor": 2, "tie_word_embeddings": False}
    | {"vision_config": {"model_type": "idefics3_vision"} | VISION}
    | {"text_config": {"model_type": "llama"} | LLAMA},
    "internvl": IMAGE_TOKENS
    | {"image_seq_length": 4, "tie_word_embeddings": False}
    | {"vision_config": {"model_type": "internvl_vision", "attention_bias": True} | VISION}
    | {"text_config": {"model_type": "qwen2"} | LLAMA},
    "llava": {"image_token_index": IMAGE, "tie_word_embeddings": False}
    | {"vision_config": {"model_type": "clip_vision_model"} | VISION}
    | {"text_config": {"model_type": "llama"} | LLAMA},
    "llava_next": {"image_token_index": IMAGE, "tie_word_embeddings": False}
    | {"image_grid_pinpoints": [[28, 56], [56, 28]]}
    | {"vision_config": {"model_type": "clip_vision_model"} | VISION}
    | {"text_config": {"model_type": "llama"} | LLAMA},
    "llava_onevision": {"image_token_index": IMAGE, "tie_word_embeddings": False}
    | {"image_grid_pinpoints": [[28, 56], [56, 28]], "vision_feature_layer": -1}
    | {"vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False} | VISION}
    | {"text_config": {"model_type": "qwen2"} | LLAMA},
    "mistral3": {"image_token_index": IMAGE, "tie_word_embeddings": False}
    | {"vision_config": {"model_type": "pixtral", "head_dim": 8} | VISION}
    | {"text_config": {"model_type": "mistral"} | LLAMA, "vision_feature_layer": -1},
    "mllama": {"image_token_index": IMAGE}
    | {
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 28,
            "patch_size": 7,
            "vision_output_dim": 32,
            "intermediate_layers_indices": [0],
            "max_num_tiles": 2,
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        }
    }
    | {
        "text_config": LLAMA
        | {"cross_attention_layers": [1]}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "paligemma": {"image_token_index": IMAGE, "projection_dim": 32}
    | {"vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False} | VISION}
    | {"text_config": {"model_type": "gemma"} | LLAMA | HEADS},
    "qwen2_vl": QWEN_IDS
    | {"vision_config": QWEN_VISION | {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}}
    | {"text_config": QWEN_TEXT},
    "qwen2_5_vl": QWEN_IDS
    | {
        "vision_config": QWEN_VISION
        | {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32}
        | {"fullatt_block_indexes": [1], "window_size": 28}
    }
    | {"text_config": QWEN_TEXT},
    "qwen3_vl": QWEN_IDS
    | {
        "vision_config": QWEN_VISION
        | {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32}
        | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    }
    | {
        "text_config": QWEN_TEXT
        | HEADS
        | {
            "rope_parameters": QWEN_TEXT["rope_parameters"] | {"mrope_interleaved": True},
        }
    },
    "smolvlm": IMAGE_TOKENS
    | {"scale_factor": 2, "tie_word_embeddings": False}
    | {"vision_config": {"model_type": "smolvlm_vision"} | VISION}
    | {"text_config": {"model_type": "llama"} | LLAMA},
}


def tiny_model(model_type: str) -> PreTrainedModel:
    """Return a random model in eval mode, with every parameter and saved buffer off its default."""
    values = TEXT.get(model_type) or WITH_IMAGES[model_type]
    auto = AutoModelForCausalLM if model_type in TEXT else AutoModelForImageTextToText
    config = AutoConfig.for_model(model_type, **copy.deepcopy(values))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = auto.from_config(config).eval()
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                # Bounds of Gemma 4's clipped layers are infinite by default.
                tensor.clamp_(-3, 3).add_(0.1 * torch.randn_like(tensor))
    return model


def batch_of(model_type: str) -> dict[str, Tensor]:
    """Return two rows of text, padded on the left; for a model that sees, each with an image."""
    generator = torch.Generator().manual_seed(0)
    length = 48 if model_type in ("llava_next", "llava_onevision") else 24
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, :5] = 0
    ids = torch.randint(5, 200, mask.shape, generator=generator) * mask
    batch = {"input_ids": ids, "attention_mask": mask}
    if model_type in TEXT:
        return batch
    pixels, size = torch.randn(2, 3, 28, 28, generator=generator), torch.tensor([[28, 28]] * 2)
    tokens = 4  # of an image in the text
    if model_type == "mllama":
        tokens = 1
        tiles = torch.stack([pixels, torch.zeros_like(pixels)], 1)
        batch |= {
            "pixel_values": tiles[:, None],
            "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.tensor([[[1, 0]]] * 2),
            "cross_attention_mask": torch.tensor([1, 0]).expand(2, 24, 1, 2),
        }
    elif model_type in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        batch["pixel_values"] = pixels.reshape(32, -1)
        batch["image_grid_thw"] = torch.tensor([[1, 4, 4]] * 2)
        batch["mm_token_type_ids"] = torch.zeros_like(ids)
        batch["mm_token_type_ids"][:, 8 : 8 + tokens] = 1
    elif model_type == "gemma4":
        patches = torch.rand(2, 16, 3 * 7 * 7, generator=generator)
        places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).expand(2, 16, 2)
        batch |= {"pixel_values": patches, "image_position_ids": places}
        batch["mm_token_type_ids"] = torch.zeros_like(ids)
        batch["mm_token_type_ids"][:, 8 : 8 + tokens] = 1
    elif model_type in ("idefics3", "smolvlm"):
        batch["pixel_values"] = pixels[:, None]
    elif model_type in ("llava_next", "llava_onevision"):
        batch |= {"pixel_values": pixels[:, None].repeat(1, 3, 1, 1, 1), "image_sizes": size}
        tokens = 36  # of the image, of its two tiles, and of the ends of their rows
    else:
        batch["pixel_values"] = pixels
        tokens = {"llava": 16, "paligemma": 16, "mistral3": 4}.get(model_type, tokens)
        if model_type == "mistral3":
            batch["image_sizes"] = size
    if model_type == "gemma3":
        batch["token_type_ids"] = torch.zeros_like(ids)
        batch["token_type_ids"][:, 7 : 7 + tokens] = 1
    if model_type == "paligemma":
        batch["token_type_ids"] = torch.zeros_like(ids)
    ids[:, 7 : 7 + tokens] = IMAGE
    return batch
