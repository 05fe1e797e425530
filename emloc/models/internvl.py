"""InternVL: tiles of an image, their places in a ChatML prompt, answers of the assistant alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from emloc.data.collate import collate
from emloc.data.examples import Example
from emloc.data.prompts import EncodedExample, encode
from emloc.data.reader import OpenCheckpoint, Reader, ReaderSettings
from emloc.errors import ConfigError
from emloc.models.vision_language import VisionLanguageModel

END = "<|im_end|>"
BEGIN_IMAGE, PLACE, END_IMAGE = "<img>", "<IMG_CONTEXT>", "</img>"


@dataclass(frozen=True, kw_only=True)
class InternVL(VisionLanguageModel):
    """InternVL2.5 and its kin, in transformers' own format or in that of the authors.

    An image becomes tiles of the vision tower's size, as many as come nearest to its shape, and a
    thumbnail of all of it if they are more than one.
    """

    system: str | None  # the system message; null: none
    tiles: int = 6  # of one image at most, without the thumbnail

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tiles < 1:
            raise ConfigError(
                f"model.tiles must be at least 1, got {self.tiles}; set model.tiles=6"
            )

    @property
    def reader_settings(self) -> ReaderSettings:
        """Tiles and ChatML."""
        return InternVLReaderSettings(self.system, self.tiles)


@dataclass(frozen=True)
class InternVLReaderSettings:
    """What is said before the first question, and how finely images are cut."""

    system: str | None
    tiles: int

    @property
    def key(self) -> list[Any]:
        """See Reading."""
        return ["internvl", self.system, self.tiles]

    def reader(self, opened: OpenCheckpoint) -> Reader:
        """See Reading."""
        return InternVLReader(self, opened)


class InternVLReader:
    """Examples for an InternVL.

    transformers' own processor for it needs torchvision, also where there are no videos; its tiles
    are cut by the same class as here.

    Raises:
        ConfigError: the tokenizer lacks what an InternVL's has.
    """

    def __init__(self, reader_settings: InternVLReaderSettings, opened: OpenCheckpoint) -> None:
        self.tokenizer: PreTrainedTokenizerBase = opened.tokenizer
        self._opened = opened
        self._tiles = reader_settings.tiles
        known = self.tokenizer.get_vocab()
        for token in (END, BEGIN_IMAGE, PLACE, END_IMAGE):
            if token not in known:
                raise ConfigError(
                    f"{opened.folder}: its tokenizer has no {token}, so that it is none of an "
                    "InternVL; set model.source"
                )
        if known[PLACE] != opened.config.image_token_id:
            raise ConfigError(
                f"{opened.folder}: {PLACE} is token {known[PLACE]} to the tokenizer and "
                f"{opened.config.image_token_id} to the model (image_token_id in config.json); "
                "set model.source"
            )
        begin = self.tokenizer.bos_token if self._begins() else ""
        self.tokenizer.chat_template = chatml(begin, reader_settings.system)
        self.tokenizer.eos_token = END

    def _begins(self) -> bool:
        """Whether the tokenizer puts a token of its own before a text."""
        first = self.tokenizer("a").input_ids[0]
        return self.tokenizer.bos_token_id is not None and first == self.tokenizer.bos_token_id

    @cached_property
    def _cut(self) -> GotOcr2ImageProcessorPil:
        height, width = self._opened.config.vision_config.image_size
        return GotOcr2ImageProcessorPil(
            size={"height": height, "width": width},
            crop_to_patches=True,
            min_patches=1,
            max_patches=self._tiles,
            image_mean=IMAGENET_DEFAULT_MEAN,
            image_std=IMAGENET_DEFAULT_STD,
        )

    @property
    def tokens_of_a_tile(self) -> int:
        """Places that a tile takes in the prompt."""
        vision = self._opened.config.vision_config
        side = vision.image_size[0] // vision.patch_size[0]
        return int((side * self._opened.config.downsample_ratio) ** 2)

    def tiles_of(self, width: int, height: int) -> int:
        """Tiles of an image of that size, the thumbnail included."""
        return int(self._cut.get_number_of_image_patches(height, width))

    def encode(self, example: Example) -> EncodedExample:
        """See Reader. No image is decoded: how many tiles it has depends on its size alone."""
        places = [self.tiles_of(*one.size) * self.tokens_of_a_tile for one in example.images]
        shown = [f"{BEGIN_IMAGE}{PLACE * count}{END_IMAGE}\n" for count in places]
        if len(shown) > 1:
            shown = [f"Image-{number}: {one}" for number, one in enumerate(shown, 1)]
        encoded = encode(self.tokenizer, replace(example, prompt="".join(shown) + example.prompt))
        place = self._opened.config.image_token_id
        found = encoded.input_ids.count(place)
        if found != sum(places):
            raise ConfigError(
                f"{example.id}: {found} image tokens for {sum(places)} places of "
                f"{len(places)} images: the text holds {PLACE} itself; correct the row, or "
                "task.prompt and task.target"
            )
        # One number for all places, which are most of the tokens: each of its own is 28 bytes.
        ids = [place if token == place else token for token in encoded.input_ids]
        return replace(encoded, input_ids=ids, images=example.images)

    def collate(
        self, batch: Sequence[EncodedExample], *, answers_only: bool = True
    ) -> dict[str, Tensor]:
        """See Reader; pixel_values (tiles of all images, 3, height, width) in the model's dtype."""
        made = collate(batch, self.tokenizer.pad_token_id, answers_only=answers_only)
        pictures = [picture for one in batch for picture in one.images]
        if pictures:
            tiles = [self._cut(one.open(), return_tensors="pt").pixel_values for one in pictures]
            made["pixel_values"] = torch.cat(tiles).to(self._opened.dtype)
        return made


def chatml(begin: str, system: str | None) -> str:
    """A chat template that says `system` first; `begin`: what stands before all."""
    before = begin if system is None else f"{begin}<|im_start|>system\n{system}{END}\n"
    return (
        f"{{{{ {before!r} }}}}"
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
