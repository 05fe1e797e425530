"""Build a tokenizer, a random Llama and a random InternVL without a download."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

SPECIAL = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer(chat: bool) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte, so that decoding restores any text exactly.

    Like Llama's tokenizer, it puts `<s>` before each text by default, and the chat template also
    writes `<s>`. An answer ends with `<|im_end|>` if `chat` is true, otherwise with `</s>`.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="<|im_end|>" if chat else "</s>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE if chat else None
    return tokenizer


def tiny_llama(tokenizer: PreTrainedTokenizerFast, **overrides: Any) -> LlamaForCausalLM:
    """Return a random two-layer Llama for `tokenizer` in eval mode, with fixed weights."""
    values: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**(values | overrides))).eval()


IMAGE_TOKEN = 7
# An image of 28 x 28 pixels has 4 x 4 patches of 7 x 7 pixels, and one token per four patches.
TINY_INTERNVL: dict[str, Any] = {
    "model_type": "internvl",
    "image_token_id": IMAGE_TOKEN,
    "image_seq_length": 4,
    "downsample_ratio": 0.5,
    "tie_word_embeddings": False,
    "vision_config": {
        "model_type": "internvl_vision",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "attention_bias": True,
        "image_size": 28,
        "patch_size": 7,
        "layer_scale_init_value": 0.3,
        "initializer_range": 0.05,
    },
    "text_config": {
        "model_type": "qwen2",
        "vocab_size": 261,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.04,
        "tie_word_embeddings": False,
    },
}


def tiny_internvl() -> InternVLForConditionalGeneration:
    """Return a random InternVL in eval mode, with fixed weights and two blocks in each half."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(**copy.deepcopy(TINY_INTERNVL))
        return InternVLForConditionalGeneration(config).eval()


def image_batch() -> dict[str, torch.Tensor]:
    """Return a batch of two rows, each with text around one image.

    Shapes: input_ids (2, 10), pixel_values (2, 3, 28, 28).
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(20).reshape(2, 10) + 10
    ids[:, 2:6] = IMAGE_TOKEN
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(2, 3, 28, 28, generator=generator),
    }


def save_checkpoint(folder: Path, chat: bool = True, **overrides: Any) -> Path:
    """Write a random Llama and its tokenizer for `from_pretrained`, and return `folder`."""
    tokenizer = tiny_tokenizer(chat)
    tiny_llama(tokenizer, **overrides).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def linears(model: torch.nn.Module, pattern: str) -> list[str]:
    """Return the full names of all `nn.Linear` modules that a regular expression matches."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and re.fullmatch(pattern, name)
    ]
