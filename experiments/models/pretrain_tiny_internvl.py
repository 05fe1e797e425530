"""Pretrain the tiny InternVL of the vision-language demo on the part `plain` of easy-VQA.

    python experiments/models/pretrain_tiny_internvl.py --steps 2000 --out DIR
    python experiments/models/pretrain_tiny_internvl.py --steps 2000 --out DIR --size r50

The script creates tokenizer, configuration and weights itself and downloads nothing. The models
that it gave on one GPU are stored beside this file: `tiny_internvl/`, and for the comparison with
small models `tiny_internvl_r50/` and `tiny_internvl_r25/`, with half and a quarter of its
parameters.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from emloc.config.compose import compose
from emloc.data.examples import Example
from emloc.stages.run_config import build as configured

SIDE, PATCH = 64, 8  # pixels
PLACES = (SIDE // PATCH // 2) ** 2  # tokens of an image; each stands for four patches
VOCABULARY = 400
PAD, START, END, IMAGE = "<|pad|>", "<|im_start|>", "<|im_end|>", "<IMG_CONTEXT>"
OTHERS = [START, "<img>", "</img>", IMAGE]
IGNORE = -100
# Share of each group in a training batch. Three quarters of the rows are yes/no questions, from
# which the model learns the least about images; they are drawn less often.
SHARES = {"yes/no": 0.4, "shape": 0.4, "color": 0.2}
BATCH, PEAK, WARMUP, DECAY = 256, 1e-3, 0.03, 0.05
NOISE, SHIFT, LIGHT = 25.0, 4, 20.0  # limits of the augmentation: grey levels, pixels, grey levels
LOG_SECONDS = 10  # seconds between two log lines


@dataclass(frozen=True)
class Size:
    """Widths of vision tower and language model; the head width of the latter must be even."""

    vision: int
    text: int
    inner: int  # width of the MLPs in the language model
    heads: int  # attention heads of the language model; the vision tower has four


SIZES = {
    "whole": Size(vision=128, text=160, inner=432, heads=5),
    "r50": Size(vision=88, text=112, inner=304, heads=4),
    "r25": Size(vision=64, text=80, inner=192, heads=4),
}


def render(question: str, answer: str) -> tuple[str, str]:
    """Return prompt and answer in ChatML without a system turn, as the reader of emloc does."""
    prompt = f"{START}user\n<img>{IMAGE * PLACES}</img>\n{question}{END}\n{START}assistant\n"
    return prompt, f"{answer}{END}"


def train_tokenizer(rows: Iterable[Example]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of at most `VOCABULARY` tokens on the texts of `rows`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END, *OTHERS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (f"user\n{row.prompt}\nassistant\n{row.target}\n" for row in rows)
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, pad_token=PAD, additional_special_tokens=OTHERS
    )


def configuration(tokenizer: PreTrainedTokenizerBase, size: Size) -> InternVLConfig:
    """Return the configuration of a model with four blocks in each half.

    The size `whole` has 2.2 million parameters.
    """
    blocks = {"num_hidden_layers": 4, "initializer_range": 0.05}
    vision: dict[str, Any] = {"model_type": "internvl_vision", "hidden_size": size.vision}
    vision |= {"intermediate_size": 4 * size.vision, "num_attention_heads": 4}
    # Layer scales of 1 and initial weights larger than usual: with the defaults of 0.1 and 0.02 the
    # model takes many times longer to distinguish shapes.
    vision |= {"image_size": SIDE, "patch_size": PATCH, "layer_scale_init_value": 1.0}
    vision |= {"attention_bias": True}
    text: dict[str, Any] = {"model_type": "llama", "vocab_size": len(tokenizer)}
    text |= {"hidden_size": size.text, "intermediate_size": size.inner}
    text |= {"num_attention_heads": size.heads, "num_key_value_heads": size.heads}
    text |= {"max_position_embeddings": 512, "tie_word_embeddings": True}
    text |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return InternVLConfig(
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=PLACES,
        tie_word_embeddings=True,
        vision_config=vision | blocks,
        text_config=text | blocks | {"bos_token_id": None},
    )


def build(config: InternVLConfig) -> InternVLForConditionalGeneration:
    """Return a model with random weights in float32."""
    model = InternVLForConditionalGeneration(config)
    # These embeddings are zero by default; a small model then learns positions slowly.
    for parameter in model.model.vision_tower.embeddings.parameters(recurse=False):
        nn.init.normal_(parameter, std=config.vision_config.initializer_range)
    return model


@dataclass(frozen=True)
class Rows:
    """All rows of a split on one device, so that a training step copies no data."""

    images: Tensor  # (images, 3, SIDE, SIDE) uint8
    image_index: Tensor  # (rows,) index into `images`
    ids: Tensor  # (rows, length), padded on the right, where a causal model ignores padding
    start: Tensor  # (rows,) position of the first answer token
    answers: Tensor  # (rows, longest answer), IGNORE after the end token
    weights: Tensor  # (rows,) relative frequency of a row in training
    groups: tuple[str, ...]


def rows_on_device(
    examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> Rows:
    """Decode each image once, tokenize each row, and move both to the device."""
    rows = list(examples)
    images = {row.images[0].key: row.images[0] for row in rows}
    pixels = np.stack([np.asarray(image.open()) for image in images.values()])
    image_index = {key: index for index, key in enumerate(images)}
    texts = [render(row.prompt, row.target) for row in rows]
    prompts = [torch.tensor(tokenizer(prompt).input_ids) for prompt, _ in texts]
    answers = [torch.tensor(tokenizer(answer).input_ids) for _, answer in texts]
    sequences = [torch.cat(pair) for pair in zip(prompts, answers, strict=True)]
    groups = tuple(row.group for row in rows)
    return Rows(
        images=torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(device),
        image_index=torch.tensor([image_index[row.images[0].key] for row in rows], device=device),
        ids=pad_sequence(sequences, True, tokenizer.pad_token_id).to(device),
        start=torch.tensor([len(prompt) for prompt in prompts], device=device),
        answers=pad_sequence(answers, True, IGNORE).to(device),
        weights=torch.tensor(
            [SHARES[group] / groups.count(group) for group in groups], device=device
        ),
        groups=groups,
    )


def augment(images: Tensor, index: Tensor) -> Tensor:
    """Return the images `index`, mirrored, shifted, brightened and noised at random.

    Shape (batch, 3, SIDE, SIDE), float.
    """
    device, size = images.device, len(index)
    shifts = torch.randint(-SHIFT, SHIFT + 1, (2, size, 1), device=device)
    down, across = (torch.arange(SIDE, device=device) + shifts).clamp(0, SIDE - 1)
    mirrored = torch.rand(size, 1, device=device) < 0.5
    across = torch.where(mirrored, SIDE - 1 - across, across)
    channels = torch.arange(3, device=device)[:, None, None]
    selection = index[:, None, None, None], channels, down[:, None, :, None], across[:, None, None]
    light, sigma = torch.rand(2, size, 1, 1, 1, device=device)
    pixels = images[selection] + LIGHT * (2 * light - 1)
    return (pixels + NOISE * sigma * torch.randn_like(pixels)).clamp_(0, 255)


def answer_logits(
    model: InternVLForConditionalGeneration, rows: Rows, index: Tensor, pixels: Tensor
) -> Tensor:
    """Return the logits (batch, longest answer, vocabulary) of the answer tokens of rows `index`.

    Like the forward of the model, but without its checks, which wait for the device at each call.
    A causal model needs no mask for padding on the right.
    """
    mean, std = (
        255 * torch.tensor(values, device=pixels.device)[:, None, None]
        for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    ids = rows.ids[index]
    features = model.get_image_features((pixels - mean) / std, return_dict=True).pooler_output
    embedded = model.get_input_embeddings()(ids)
    is_image_token = (ids == model.config.image_token_id)[..., None]
    embedded = embedded.masked_scatter(is_image_token, features.to(embedded.dtype))
    hidden = model.model.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    # The logits at one position predict the token at the next position.
    before = rows.start[index, None] - 1
    steps = torch.arange(rows.answers.shape[1], device=ids.device)
    positions = (before + steps).clamp(max=ids.shape[1] - 1)[..., None]
    logits: Tensor = model.lm_head(hidden.gather(1, positions.expand(-1, -1, hidden.shape[-1])))
    return logits


@torch.inference_mode()
def accuracy(model: InternVLForConditionalGeneration, rows: Rows, limit: int | None = None) -> str:
    """Return the share of exactly answered rows among the first `limit`, in all and by group."""
    batches = []
    for index in torch.arange(len(rows.ids), device=rows.ids.device)[:limit].split(512):
        pixels = rows.images[rows.image_index[index]].float()
        predicted = answer_logits(model, rows, index, pixels).argmax(-1)
        batches.append(
            ((predicted == rows.answers[index]) | (rows.answers[index] == IGNORE)).all(-1)
        )
    is_exact = torch.cat(batches).tolist()
    shares = {"all": sum(is_exact) / len(is_exact)}
    for group in SHARES:
        pairs = zip(is_exact, rows.groups[:limit], strict=True)
        hits = [hit for hit, name in pairs if name == group]
        shares[group] = sum(hits) / max(len(hits), 1)
    return "  ".join(f"{name} {share:.3f}" for name, share in shares.items())


def train(
    model: InternVLForConditionalGeneration,
    rows: Rows,
    test: Rows,
    share_done: Callable[[int], float],
) -> None:
    """Train with AdamW on the answer tokens until `share_done(step)` reaches 1."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    begin = logged = time.monotonic()
    step = 0
    while (share := share_done(step)) < 1:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(share)
        index = torch.multinomial(rows.weights, BATCH, replacement=True)
        pixels = augment(rows.images, rows.image_index[index])
        logits = answer_logits(model, rows, index, pixels).transpose(1, 2)
        loss = functional.cross_entropy(logits, rows.answers[index], ignore_index=IGNORE)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        step += 1
        if (now := time.monotonic()) - logged >= LOG_SECONDS:
            logged = now
            line = f"{now - begin:4.0f} s  step {step}  loss {loss.item():.4f}"
            print(f"{line}  {accuracy(model, test, 512)}", flush=True)


def learning_rate(share: float) -> float:
    """Return the learning rate after this share of the steps: linear warmup, then cosine to 0."""
    if share < WARMUP:
        return PEAK * share / WARMUP
    return PEAK * (1 + math.cos(math.pi * (share - WARMUP) / (1 - WARMUP))) / 2


def save(
    model: InternVLForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write a bfloat16 checkpoint with tokenizer and image processor."""
    # A new bfloat16 model gets the weights; a cast would also round the rotary frequencies.
    rounded = InternVLForConditionalGeneration._from_config(model.config, dtype=torch.bfloat16)
    rounded.load_state_dict(model.state_dict())
    rounded.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    GotOcr2ImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        crop_to_patches=False,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    ).save_pretrained(folder)


def main() -> None:
    """Pretrain the model, save it, and print its accuracy before and after the rounding."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, required=True, help="number of training steps")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--size", choices=SIZES, default="whole", help="size of the model")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")

    task = configured(compose(["task=easy_vqa", "task.part=plain"])).task
    tokenizer = train_tokenizer(task.train())
    rows = rows_on_device(task.train(), tokenizer, device)
    test = rows_on_device(task.held_out(None), tokenizer, device)
    model = build(configuration(tokenizer, SIZES[arguments.size])).to(device)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{count:,} parameters, {len(tokenizer)} tokens, rows of {rows.ids.shape[1]}", flush=True)
    train(model, rows, test, lambda step: step / arguments.steps)
    print(f"trained   {accuracy(model, test)}", flush=True)
    save(model, tokenizer, arguments.out)
    saved = InternVLForConditionalGeneration.from_pretrained(arguments.out, dtype=torch.bfloat16)
    print(f"as saved  {accuracy(saved.to(device), test)}")


if __name__ == "__main__":
    main()
