"""Tiny models of three architectures to walk through, and what their blocks take and give."""

from __future__ import annotations

import torch
from tiny import tiny_llama, tiny_tokenizer
from torch import Tensor, nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
)

from emloc.calibration.offload import tensors_in

IMAGE = 250  # the token an image's features are put in place of
TEXT = {
    "vocab_size": 261,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def llama() -> nn.Module:
    return tiny_llama(tiny_tokenizer(True), num_hidden_layers=3)


def gemma3() -> nn.Module:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3TextConfig(
        num_hidden_layers=3, layer_types=kinds, sliding_window=3, head_dim=8, **TEXT
    )
    return Gemma3ForCausalLM(config)


def internvl() -> nn.Module:
    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": [16, 16],
        "patch_size": [4, 4],
    }
    config = InternVLConfig(
        vision_config=vision,
        text_config={"model_type": "qwen2", "num_hidden_layers": 2, **TEXT},
        image_token_id=IMAGE,
        image_seq_length=4,
    )
    return InternVLForConditionalGeneration(config)


MODELS = {"llama": llama, "gemma3": gemma3, "internvl": internvl}


def batches_of(kind: str) -> list[dict[str, Tensor]]:
    """Padded on the left; for InternVL also images, and one batch of text alone."""
    torch.manual_seed(1)
    made = []
    for lengths in ([12, 9], [7, 20, 8], [15]):
        mask = torch.tensor([[0] * (max(lengths) - n) + [1] * n for n in lengths])
        ids = torch.randint(5, 240, mask.shape) * mask
        one = {"input_ids": ids, "attention_mask": mask}
        if kind == "internvl" and len(made) != 1:
            ids[:, -6:-2] = IMAGE
            one["pixel_values"] = torch.randn(len(lengths), 3, 16, 16)
        made.append(one)
    return made


def made(kind: str) -> tuple[nn.Module, list[str]]:
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    names = [name for name, _ in model.named_modules() if name.split(".")[-1].isdigit()]
    return model, names


def watch(model: nn.Module, names: list[str]) -> dict[str, list[list[Tensor]]]:
    """All tensors that go into and come out of the blocks, as they are seen there."""
    seen: dict[str, list[list[Tensor]]] = {name: [] for name in names}

    def keep(name: str):
        return lambda _, args, kwargs, out: seen[name].append(
            [one.clone() for one in tensors_in([args, dict(sorted(kwargs.items())), out])]
        )

    for name in names:
        block = model.get_submodule(name)
        block.register_forward_hook(keep(name), with_kwargs=True, prepend=True)
    return seen
