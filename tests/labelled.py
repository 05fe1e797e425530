"""Write tiny encoders without a classification head, and rows that are labelled with a class."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tiny import tiny_tokenizer
from transformers import RobertaConfig, RobertaForMaskedLM, ViTConfig, ViTModel

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
# No dropout, so that the losses of two runs can be compared.
WITHOUT_DROPOUT = SMALL | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def write_roberta(folder: Path) -> None:
    """Write a RoBERTa language model; a classifier uses all its weights except the head."""
    tokenizer = tiny_tokenizer(chat=False)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        pad_token_id=0,
        num_hidden_layers=5,
        type_vocab_size=1,
        **WITHOUT_DROPOUT,
    )
    torch.manual_seed(0)
    RobertaForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_vit(folder: Path) -> None:
    """Write a bare ViT encoder, whose tensor names lack the prefix of a classifier."""
    config = ViTConfig(image_size=28, patch_size=7, num_hidden_layers=5, **SMALL)
    torch.manual_seed(0)
    ViTModel(config).save_pretrained(folder)


def _write(folder: Path, rows: list[dict[str, str]]) -> None:
    for split, part in (("train", rows[:32]), ("test", rows[32:])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{split}.jsonl").write_text(lines)


def write_texts(folder: Path) -> None:
    """Write texts of several lengths; the first letter decides the class and the vector."""
    rows = [
        {"text": "zx"[i % 2] * 6 + "b" * (i % 5) + str(i), "label": ("even", "odd")[i % 2]}
        | {"vector": ("2 -1", "-1 2")[i % 2]}
        for i in range(44)
    ]
    _write(folder, rows)


def write_images(folder: Path) -> None:
    """Write images of two classes, dark and light."""
    (folder / "images").mkdir()
    generator = np.random.default_rng(0)
    rows = []
    for i in range(44):
        noise = generator.integers(0, 60, (20, 20, 3)) + (0, 180)[i % 2]
        Image.fromarray(noise.astype(np.uint8)).save(folder / "images" / f"{i}.png")
        rows.append({"image": f"{i}.png", "label": ("dark", "light")[i % 2]})
    _write(folder, rows)
