"""The memory-saving path on architectures with features that Llama lacks."""

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from emloc.adapters.fused import fuse
from emloc.models.objectives.answer_loss import install_answer_loss
from emloc.models.objectives.tokens import Tokens
from emloc.tensors.lean.model import offload_embedding, recompute_layers
from emloc.tensors.lean.modules import fuse_modules

SHAPE = {
    **{"vocab_size": 261, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    **{"max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
# Features of each model that Llama lacks, and whether the model's own loss must be used.
MODELS = {
    "qwen2": ({}, False),  # biases on query, key and value
    "gemma2": ({}, True),  # norms with 1 + weight, a scaled embedding, a cap on the logits
    "gemma3_text": ({}, False),  # two masks
    "cohere": ({}, False),  # a scale after the head, LayerNorm, parallel attention and MLP
    "granite": ({}, False),  # scales in four places
    "gpt_neox": ({}, False),  # one fused matrix for query, key and value, with biases
    "phi3": ({}, False),  # fused matrices for query, key and value, and for gate and up
    "opt": ({"ffn_dim": 64, "word_embed_proj_dim": 32}, False),  # functional dropout
    "seed_oss": ({"attention_dropout": 0.0, "residual_dropout": 0.1}, False),  # dropout in its MLP
    "mixtral": (EXPERTS, True),  # a router with its own loss
    "mamba": ({"state_size": 4}, False),  # reads the dtype of the head
}


def adapted(kind):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SHAPE, **MODELS[kind][0])
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    excluded = {model.get_output_embeddings()}
    if kind == "mamba":  # PEFT refuses the last projection
        excluded |= {module for name, module in model.named_modules() if name.endswith("out_proj")}
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    targets = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module not in excluded and re.search(r"\d", name)
    ]
    pattern = "|".join(map(re.escape, targets))
    tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=pattern))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return tuned.train()


def batch():
    """Return three texts padded on the left, with answers of different lengths."""
    torch.manual_seed(1)
    ids = torch.randint(5, 200, (3, 17))
    mask = torch.ones_like(ids)
    mask[1, :5] = mask[2, :2] = 0
    labels = ids.clone()
    for row, start in enumerate((9, 14, 11)):
        labels[row, :start] = -100
    return {"input_ids": ids * mask, "attention_mask": mask}, labels


@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_gradients_equal_those_of_the_plain_path(kind):
    inputs, labels = batch()
    plain = adapted(kind)
    torch.manual_seed(7)
    expected = plain(**inputs, labels=labels).loss
    expected.backward()
    lean = adapted(kind)
    inner = lean.get_base_model()
    assert fuse(lean) > 0
    offload_embedding(inner)
    fuse_modules(inner, torch.float32)
    loss = install_answer_loss(inner)
    assert (loss is None) == MODELS[kind][1]
    recompute_layers(inner)
    torch.manual_seed(7)
    rows = {**inputs, "labels": labels}
    actual = (loss or Tokens().loss)(lean, rows, Tokens().items(rows))
    actual.backward()
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)
    true = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    got = {name: p.grad for name, p in lean.named_parameters() if p.grad is not None}
    assert got.keys() == true.keys()
    for name, gradient in true.items():
        assert (got[name] - gradient).norm() <= 1e-4 * gradient.norm(), name
