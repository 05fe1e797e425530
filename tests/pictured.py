"""Build tiny vision-language models, their processors and images."""

import copy
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tiny import TINY_INTERNVL, tiny_tokenizer
from transformers import (
    AutoConfig,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    InternVLForConditionalGeneration,
    PreTrainedTokenizerFast,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from emloc.data.examples import Example, Examples
from emloc.data.image import LazyImage
from emloc.tasks.metrics import exact

PLACE = "<IMG_CONTEXT>"  # token that the features of an image replace
# Like the chat template of Gemma: the content of a message is a list of parts, text or image.
CHAT_TEMPLATE_WITH_IMAGES = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<boi>{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def image_bytes(width: int = 28, height: int = 28, seed: int = 0, kind: str = "PNG") -> bytes:
    """Return the bytes of an image file with random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def lazy_image(name: str, content: bytes) -> LazyImage:
    """Return an image that is decoded from `content` when it is opened."""
    return LazyImage(name, name, lambda: content)


def vqa_examples(split: str, count: int) -> Examples:
    """Return `count` questions about images, half of them with one tile and half with several.

    The groups `square` and `wide` name the two shapes of the images.
    """
    rows = []
    for index in range(count):
        width = 28 if index % 2 else 84
        image = lazy_image(f"{split}/{index}", image_bytes(width, 28, index))
        answer = ("yes", "no", "2")[index % 3]
        rows.append(
            Example(
                f"{split}/{index}",
                f"Is it {index}?",
                answer,
                images=(image,),
                references=(answer,),
                group="square" if index % 2 else "wide",
            )
        )
    return Examples("vqa", tuple(rows))


class VqaTask:
    """A task of questions about images."""

    name, metric, lm_eval, answer_tokens = "seen", "accuracy", None, 3
    score = staticmethod(exact.score)

    def __init__(self) -> None:
        self.key = {"seen": type(self).__name__}

    def train(self):
        return vqa_examples("train", 16)

    def held_out(self, limit):
        return vqa_examples("test", 6 if limit is None else min(limit, 6))


def save_internvl(folder: Path, **text: int) -> Path:
    """Write a random InternVL and a tokenizer with its image tokens, and return `folder`."""
    tokenizer = tiny_tokenizer(chat=True)
    words = ["<|im_start|>", "<|im_end|>", "<img>", "</img>", PLACE]
    tokenizer.add_special_tokens({"additional_special_tokens": words})
    shape = copy.deepcopy(TINY_INTERNVL)
    shape["image_token_id"] = tokenizer.convert_tokens_to_ids(PLACE)
    shape["text_config"] |= {"vocab_size": len(tokenizer), "max_position_embeddings": 512} | text
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = InternVLForConditionalGeneration(AutoConfig.for_model(**shape))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_gemma(folder: Path) -> Path:
    """Write a random Gemma3 and its own processor, and return `folder`."""
    core = tiny_tokenizer(chat=True)
    core.add_special_tokens({"additional_special_tokens": ["<boi>", "<eoi>", "<image>"]})
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core.backend_tokenizer,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"},
    )
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size={"height": 28, "width": 28}),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE_WITH_IMAGES,
        image_seq_length=4,
    )
    blocks = {"num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 4}
    text = {"hidden_size": 32, "head_dim": 8, "num_key_value_heads": 2, "sliding_window": 16}
    text |= {"model_type": "gemma3_text", "vocab_size": len(tokenizer)}
    text |= {"layer_types": ["sliding_attention", "full_attention"]}
    vision = {"model_type": "siglip_vision_model", "hidden_size": 16, "vision_use_head": False}
    config = AutoConfig.for_model(
        "gemma3",
        mm_tokens_per_image=4,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        vision_config=vision | blocks | {"image_size": 28, "patch_size": 7},
        text_config=text | blocks | {"max_position_embeddings": 512},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Gemma3ForConditionalGeneration(config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
