"""InternVL models: cut images into tiles and put image tokens for the tiles into ChatML prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from emloc.config.values import Range, Text
from emloc.data.collate import collate
from emloc.data.examples import Example
from emloc.data.image import LazyImage
from emloc.data.pending import PendingBatch, image_threads, pin
from emloc.data.prompts import EncodedExample, encode
from emloc.data.reader import OpenCheckpoint, Reader, ReaderSettings
from emloc.errors import ConfigError
from emloc.models.vision_language import VisionLanguageModel

END_OF_TURN = "<|im_end|>"
BEGIN_IMAGE, IMAGE_TOKEN, END_IMAGE = "<img>", "<IMG_CONTEXT>", "</img>"


@dataclass(frozen=True, kw_only=True)
class InternVL(VisionLanguageModel):
    """InternVL2.5 and related models, in transformers' format or the authors' format.

    An image is cut into tiles of the vision tower's input size, in the grid that fits its aspect
    ratio best. If there are several tiles, a thumbnail of the whole image is added.
    """

    # system message; null: no system message
    system: Annotated[str | None, Text(may_be_empty=True)]
    # maximum number of tiles per image, without the thumbnail
    tiles: Annotated[int, Range(least=1, usual=6)] = 6

    @property
    def reader_settings(self) -> ReaderSettings:
        """Read images as tiles and text as ChatML prompts."""
        return InternVLReaderSettings(self.system, self.tiles)


@dataclass(frozen=True)
class InternVLReaderSettings:
    """The system message and the maximum number of tiles per image."""

    system: str | None
    tiles: int

    @property
    def key(self) -> list[Any]:
        """Cache key of everything that decides how examples are read."""
        return ["internvl", self.system, self.tiles]

    def reader(self, checkpoint: OpenCheckpoint) -> Reader:
        """Open the reader of an InternVL checkpoint."""
        return InternVLReader(self, checkpoint)


class InternVLReader:
    """Encodes examples and collates batches for an InternVL model.

    Transformers' processor for InternVL is not used, because it needs torchvision even without
    videos. The tiles are cut by the class that this processor uses as well.

    Raises:
        ConfigError: the tokenizer lacks a token that InternVL needs, or the image token has another
            id in the model's configuration.
    """

    def __init__(self, reader_settings: InternVLReaderSettings, checkpoint: OpenCheckpoint) -> None:
        self.tokenizer: PreTrainedTokenizerBase = checkpoint.tokenizer
        self._checkpoint = checkpoint
        self._tiles = reader_settings.tiles
        vocabulary = self.tokenizer.get_vocab()
        for token in (END_OF_TURN, BEGIN_IMAGE, IMAGE_TOKEN, END_IMAGE):
            if token not in vocabulary:
                raise ConfigError(
                    f"{checkpoint.folder}: the tokenizer has no token {token}, which InternVL "
                    "needs; set model.source to an InternVL checkpoint"
                )
        if vocabulary[IMAGE_TOKEN] != checkpoint.config.image_token_id:
            raise ConfigError(
                f"{checkpoint.folder}: {IMAGE_TOKEN} has id {vocabulary[IMAGE_TOKEN]} in the "
                f"tokenizer, but {checkpoint.config.image_token_id} in the model (image_token_id "
                "in config.json); set model.source to another checkpoint"
            )
        begin = self.tokenizer.bos_token if self._adds_begin_token() else ""
        self.tokenizer.chat_template = chatml_template(begin, reader_settings.system)
        self.tokenizer.eos_token = END_OF_TURN

    def _adds_begin_token(self) -> bool:
        """Whether the tokenizer puts its begin token before every text."""
        first = self.tokenizer("a").input_ids[0]
        return self.tokenizer.bos_token_id is not None and first == self.tokenizer.bos_token_id

    @cached_property
    def _tile_processor(self) -> GotOcr2ImageProcessorPil:
        """Cuts images into tiles of the vision tower's input size and normalises them."""
        height, width = self._checkpoint.config.vision_config.image_size
        return GotOcr2ImageProcessorPil(
            size={"height": height, "width": width},
            crop_to_patches=True,
            min_patches=1,
            max_patches=self._tiles,
            image_mean=IMAGENET_DEFAULT_MEAN,
            image_std=IMAGENET_DEFAULT_STD,
        )

    @property
    def tokens_per_tile(self) -> int:
        """Number of image tokens per tile in the prompt."""
        vision = self._checkpoint.config.vision_config
        side = vision.image_size[0] // vision.patch_size[0]
        return int((side * self._checkpoint.config.downsample_ratio) ** 2)

    def tile_count(self, width: int, height: int) -> int:
        """Number of tiles of an image with this size in pixels, with the thumbnail."""
        return int(self._tile_processor.get_number_of_image_patches(height, width))

    def encode(self, example: Example) -> EncodedExample:
        """Encode prompt and answer as tokens, with image tokens for the tiles before the prompt.

        Images are not decoded, since the number of tiles depends on the image's size alone.
        """
        counts = [self.tile_count(*image.size) * self.tokens_per_tile for image in example.images]
        tags = [f"{BEGIN_IMAGE}{IMAGE_TOKEN * count}{END_IMAGE}\n" for count in counts]
        if len(tags) > 1:
            tags = [f"Image-{number}: {tag}" for number, tag in enumerate(tags, 1)]
        encoded = encode(self.tokenizer, replace(example, prompt="".join(tags) + example.prompt))
        image_token_id = self._checkpoint.config.image_token_id
        encoded_count = encoded.input_ids.count(image_token_id)
        if encoded_count != sum(counts):
            raise ConfigError(
                f"{example.id}: {encoded_count} image tokens instead of {sum(counts)} for "
                f"{len(counts)} images: the text holds {IMAGE_TOKEN} itself; correct the row, or "
                "task.prompt and task.target"
            )
        # Most tokens are image tokens. They share one int object, as separate ones need 28 bytes.
        ids = [image_token_id if id_ == image_token_id else id_ for id_ in encoded.input_ids]
        return replace(encoded, input_ids=ids, images=example.images)

    def collate(
        self, batch: Sequence[EncodedExample], *, answers_only: bool = True
    ) -> dict[str, Tensor]:
        """Collate rows into a batch with padded tokens and the tiles of all images.

        The tiles are `pixel_values` (tiles, 3, height, width) in the model's dtype.
        """
        return {**self.collate_ahead(batch, answers_only=answers_only)}

    def collate_ahead(
        self, batch: Sequence[EncodedExample], *, answers_only: bool = True
    ) -> Mapping[str, Tensor]:
        """Collate as `collate` does, while threads still cut the images."""
        tensors = collate(batch, self.tokenizer.pad_token_id, answers_only=answers_only)
        images = [image for row in batch for image in row.images]
        if not images:
            return tensors
        tiles = [image_threads().submit(self._cut, image) for image in images]
        # Begun last, so that this thread waits for no image that is not being cut already.
        pixels = image_threads().submit(_joined, tiles)
        return PendingBatch(tensors, lambda: {"pixel_values": pixels.result()}, ["pixel_values"])

    def _cut(self, image: LazyImage) -> Tensor:
        """Tiles of one image (tiles, 3, height, width) in the model's dtype."""
        tiles: Tensor = self._tile_processor(image.open(), return_tensors="pt").pixel_values
        return tiles.to(self._checkpoint.dtype)


def _joined(parts: Sequence[Future[Tensor]]) -> Tensor:
    """Return the tensors of some threads in one."""
    return pin(torch.cat([part.result() for part in parts]))


def chatml_template(begin: str, system: str | None) -> str:
    """A ChatML template in Jinja that begins with the token `begin` and the `system` message."""
    start = begin if system is None else f"{begin}<|im_start|>system\n{system}{END_OF_TURN}\n"
    return (
        f"{{{{ {start!r} }}}}"
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
