"""Pretrain the tiny InternVL of the vision-language demo on the plain part of easy-VQA.

    python experiments/models/pretrain_tiny_internvl.py --steps 2000 --out DIR
    python experiments/models/pretrain_tiny_internvl.py --steps 2000 --out DIR --size r50

Tokenizer, configuration and weights are made from nothing. What came of it on one GPU is committed
beside this file, in `tiny_internvl/`, and smaller ones of half and a quarter of its parameters, for
the comparison with a small model, in `tiny_internvl_r50/` and `tiny_internvl_r25/`.
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
PLACES = (SIDE // PATCH // 2) ** 2  # tokens of an image: four patches make one
VOCABULARY = 400
PAD, START, END, IMAGE = "<|pad|>", "<|im_start|>", "<|im_end|>", "<IMG_CONTEXT>"
OTHERS = [START, "<img>", "</img>", IMAGE]
IGNORE = -100
# Three quarters of the rows are yes/no, which say the least about an image.
SHARES = {"yes/no": 0.4, "shape": 0.4, "color": 0.2}
BATCH, PEAK, WARMUP, DECAY = 256, 1e-3, 0.03, 0.05
NOISE, SHIFT, LIGHT = 25.0, 4, 20.0  # the most of each, in grey levels and pixels
LOG_SECONDS = 10


@dataclass(frozen=True)
class Size:
    """Widths of both halves of the model; heads of the language model are of even width."""

    vision: int
    text: int
    inner: int  # of the language model's MLP
    heads: int  # of the language model; the vision tower has four


SIZES = {
    "whole": Size(vision=128, text=160, inner=432, heads=5),
    "r50": Size(vision=88, text=112, inner=304, heads=4),
    "r25": Size(vision=64, text=80, inner=192, heads=4),
}


def rendered(question: str, answer: str) -> tuple[str, str]:
    """Prompt and answer in ChatML without a system turn, as the model's reader writes them."""
    prompt = f"{START}user\n<img>{IMAGE * PLACES}</img>\n{question}{END}\n{START}assistant\n"
    return prompt, f"{answer}{END}"


def train_tokenizer(rows: Iterable[Example]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most `VOCABULARY` tokens, from the text of `rows` alone."""
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
    """Both halves of four blocks; 2.2 million parameters if whole."""
    blocks = {"num_hidden_layers": 4, "initializer_range": 0.05}
    vision: dict[str, Any] = {"model_type": "internvl_vision", "hidden_size": size.vision}
    vision |= {"intermediate_size": 4 * size.vision, "num_attention_heads": 4}
    # Branches of full strength, and weights of more than the usual size: with a tenth of the one
    # and .02 of the other it takes many times as long until shapes are told apart.
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
    """A random model in float32."""
    model = InternVLForConditionalGeneration(config)
    # Zero by default, from where a small transformer is slow to tell places apart.
    for parameter in model.model.vision_tower.embeddings.parameters(recurse=False):
        nn.init.normal_(parameter, std=config.vision_config.initializer_range)
    return model


@dataclass(frozen=True)
class Rows:
    """All rows of a split on one device, so that a step moves nothing to it."""

    images: Tensor  # (pictures, 3, SIDE, SIDE) uint8
    picture: Tensor  # (rows,) index into `images`
    ids: Tensor  # (rows, length), padded on the right: nothing before the padding sees it
    start: Tensor  # (rows,) place of the first answer token
    answers: Tensor  # (rows, longest answer), IGNORE behind its end token
    weights: Tensor  # (rows,) how often one is drawn
    groups: tuple[str, ...]


def on_device(
    examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> Rows:
    """Every image decoded once, every row as tokens."""
    rows = list(examples)
    pictures = {row.images[0].key: row.images[0] for row in rows}
    pixels = np.stack([np.asarray(one.open()) for one in pictures.values()])
    place = {key: index for index, key in enumerate(pictures)}
    texts = [rendered(row.prompt, row.target) for row in rows]
    prompts = [torch.tensor(tokenizer(prompt).input_ids) for prompt, _ in texts]
    answers = [torch.tensor(tokenizer(answer).input_ids) for _, answer in texts]
    whole = [torch.cat(both) for both in zip(prompts, answers, strict=True)]
    groups = tuple(row.group for row in rows)
    return Rows(
        images=torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(device),
        picture=torch.tensor([place[row.images[0].key] for row in rows], device=device),
        ids=pad_sequence(whole, True, tokenizer.pad_token_id).to(device),
        start=torch.tensor([len(prompt) for prompt in prompts], device=device),
        answers=pad_sequence(answers, True, IGNORE).to(device),
        weights=torch.tensor([SHARES[one] / groups.count(one) for one in groups], device=device),
        groups=groups,
    )


def augmented(images: Tensor, picture: Tensor) -> Tensor:
    """Images (batch, 3, SIDE, SIDE) float: mirrored, shifted, lit and noised at random."""
    device, size = images.device, len(picture)
    shifts = torch.randint(-SHIFT, SHIFT + 1, (2, size, 1), device=device)
    down, across = (torch.arange(SIDE, device=device) + shifts).clamp(0, SIDE - 1)
    mirrored = torch.rand(size, 1, device=device) < 0.5
    across = torch.where(mirrored, SIDE - 1 - across, across)
    channels = torch.arange(3, device=device)[:, None, None]
    chosen = picture[:, None, None, None], channels, down[:, None, :, None], across[:, None, None]
    light, sigma = torch.rand(2, size, 1, 1, 1, device=device)
    pixels = images[chosen] + LIGHT * (2 * light - 1)
    return (pixels + NOISE * sigma * torch.randn_like(pixels)).clamp_(0, 255)


def answer_logits(
    model: InternVLForConditionalGeneration, rows: Rows, index: Tensor, pixels: Tensor
) -> Tensor:
    """Logits (batch, longest answer, vocabulary) that predict the answer tokens of rows `index`.

    The model's own forward without what that checks on the host at every call. With the padding on
    the right a causal model needs no mask.
    """
    mean, std = (
        255 * torch.tensor(values, device=pixels.device)[:, None, None]
        for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    ids = rows.ids[index]
    seen = model.get_image_features((pixels - mean) / std, return_dict=True).pooler_output
    embedded = model.get_input_embeddings()(ids)
    places = (ids == model.config.image_token_id)[..., None]
    embedded = embedded.masked_scatter(places, seen.to(embedded.dtype))
    hidden = model.model.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    # The token before predicts.
    before = rows.start[index, None] - 1
    steps = torch.arange(rows.answers.shape[1], device=ids.device)
    wanted = (before + steps).clamp(max=ids.shape[1] - 1)[..., None]
    logits: Tensor = model.lm_head(hidden.gather(1, wanted.expand(-1, -1, hidden.shape[-1])))
    return logits


@torch.inference_mode()
def accuracy(model: InternVLForConditionalGeneration, rows: Rows, limit: int | None = None) -> str:
    """Share of the first `limit` rows answered right, end token included: all, and by kind."""
    found = []
    for index in torch.arange(len(rows.ids), device=rows.ids.device)[:limit].split(512):
        pixels = rows.images[rows.picture[index]].float()
        given = answer_logits(model, rows, index, pixels).argmax(-1)
        found.append(((given == rows.answers[index]) | (rows.answers[index] == IGNORE)).all(-1))
    right = torch.cat(found).tolist()
    shares = {"all": sum(right) / len(right)}
    for group in SHARES:
        own = [hit for hit, one in zip(right, rows.groups[:limit], strict=True) if one == group]
        shares[group] = sum(own) / max(len(own), 1)
    return "  ".join(f"{name} {share:.3f}" for name, share in shares.items())


def train(
    model: InternVLForConditionalGeneration, rows: Rows, test: Rows, passed: Callable[[int], float]
) -> None:
    """AdamW on the answers alone, until `passed(step)`, the share of the training done, is 1."""
    matrices = [one for one in model.parameters() if one.ndim >= 2]
    vectors = [one for one in model.parameters() if one.ndim < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    begin = logged = time.monotonic()
    step = 0
    while (share := passed(step)) < 1:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(share)
        index = torch.multinomial(rows.weights, BATCH, replacement=True)
        pixels = augmented(rows.images, rows.picture[index])
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


def learning_rate(passed: float) -> float:
    """At a share `passed` of the steps: up in a straight line, then down to 0 as a cosine."""
    if passed < WARMUP:
        return PEAK * passed / WARMUP
    return PEAK * (1 + math.cos(math.pi * (passed - WARMUP) / (1 - WARMUP))) / 2


def save(
    model: InternVLForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """A bfloat16 checkpoint folder, tokenizer and image processor included."""
    # Built in bfloat16 and filled: a cast would round the model's rotary frequencies as well.
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
    """Pretrain, save, and score before and after rounding."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, required=True, help="of training")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--size", choices=SIZES, default="whole", help="share of the parameters")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")

    task = configured(compose(["task=easy_vqa", "task.part=plain"])).task
    tokenizer = train_tokenizer(task.train())
    rows = on_device(task.train(), tokenizer, device)
    test = on_device(task.held_out(None), tokenizer, device)
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
