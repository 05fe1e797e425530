"""Tiny models, a recorder of the inputs and outputs of their blocks, and memory off a device."""

from __future__ import annotations

from typing import ClassVar
from weakref import ref

import torch
from tiny import tiny_llama, tiny_tokenizer
from torch import Tensor, nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
)

from emloc.calibration.offload import OffloadPool, tensors_in

IMAGE = 250  # token that the features of an image replace
TEXT = {
    "vocab_size": 261,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def llama() -> nn.Module:
    """Return a random Llama with three blocks."""
    return tiny_llama(tiny_tokenizer(True), num_hidden_layers=3)


def gemma3() -> nn.Module:
    """Return a random Gemma3 with three blocks: sliding, full and sliding attention."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3TextConfig(
        num_hidden_layers=3, layer_types=kinds, sliding_window=3, head_dim=8, **TEXT
    )
    return Gemma3ForCausalLM(config)


def internvl() -> nn.Module:
    """Return a random InternVL with two blocks in each half."""
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
    """Return three batches padded on the left; two of those for InternVL also contain images."""
    torch.manual_seed(1)
    batches = []
    for lengths in ([12, 9], [7, 20, 8], [15]):
        mask = torch.tensor([[0] * (max(lengths) - n) + [1] * n for n in lengths])
        ids = torch.randint(5, 240, mask.shape) * mask
        batch = {"input_ids": ids, "attention_mask": mask}
        if kind == "internvl" and len(batches) != 1:
            ids[:, -6:-2] = IMAGE
            batch["pixel_values"] = torch.randn(len(lengths), 3, 16, 16)
        batches.append(batch)
    return batches


def model_and_blocks(kind: str) -> tuple[nn.Module, list[str]]:
    """Return a model of `MODELS` in eval mode, and the names of its blocks."""
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    names = [name for name, _ in model.named_modules() if name.split(".")[-1].isdigit()]
    return model, names


def record_block_tensors(model: nn.Module, names: list[str]) -> dict[str, list[list[Tensor]]]:
    """Record copies of all input and output tensors of the blocks, one list for each call."""
    recorded: dict[str, list[list[Tensor]]] = {name: [] for name in names}

    def recorder(name: str):
        return lambda _, args, kwargs, out: recorded[name].append(
            [one.clone() for one in tensors_in([args, dict(sorted(kwargs.items())), out])]
        )

    for name in names:
        block = model.get_submodule(name)
        block.register_forward_hook(recorder(name), with_kwargs=True, prepend=True)
    return recorded


class PoolOfDevice(OffloadPool):
    """A pool that behaves as if its device were none that computes on host memory."""

    is_directly_usable = False


class SpoilingPool(PoolOfDevice):
    """A pool in whose host memory all bits are inverted, so that operations there are wrong."""

    pools: ClassVar[list] = []

    def __init__(self, *args):
        super().__init__(*args)
        self.pools.append(self)
        self.fetched = []  # bytes of the copies that came back
        self.copies = {}  # storage -> reference to the copy

    def store(self, storage_bytes, **options):
        stored, on_disk = super().store(storage_bytes, **options)
        self.copies[stored.untyped_storage()._cdata] = ref(stored)
        return stored.bitwise_not_(), on_disk

    def fetch(self, stored):
        self.fetched.append(stored.numel())
        return stored.bitwise_not()

    def is_movable(self, tensor):
        copy = self.copies.get(tensor.untyped_storage()._cdata, lambda: None)()
        return super().is_movable(tensor) and copy is None
