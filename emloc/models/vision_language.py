"""Vision-language models: they read images and text through their own processor, and write text."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerBase

from emloc.data.chat_template import (
    AnswerFrame,
    Message,
    end_tokens,
    find_answer_frame,
    has_template,
    render_messages,
)
from emloc.data.collate import collate
from emloc.data.examples import Example
from emloc.data.pending import PendingBatch, processor_thread
from emloc.data.prompts import (
    EncodedExample,
    EncodedPair,
    encode,
    encode_answer,
)
from emloc.data.reader import OpenCheckpoint, Reader, ReaderSettings
from emloc.errors import ConfigError, one_line
from emloc.models.generative import GenerativeModel

# Outputs of a processor with one value per token that says whether a token is text or image.
_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True, kw_only=True)
class VisionLanguageModel(GenerativeModel):
    """Any `AutoModelForImageTextToText` whose transformer blocks consist of `nn.Linear` layers.

    The processor in the checkpoint prepares the images and puts image tokens into the prompt.
    """

    auto = AutoModelForImageTextToText

    @property
    def reader_settings(self) -> ReaderSettings:
        """Read examples through the checkpoint's processor."""
        return ProcessorReaderSettings()


@dataclass(frozen=True)
class ProcessorReaderSettings:
    """Settings of a reader that uses the checkpoint's processor; the checkpoint contains them."""

    @property
    def key(self) -> list[Any]:
        """Cache key of the reader; the processor's settings are part of the checkpoint's key."""
        return ["processor"]

    def reader(self, checkpoint: OpenCheckpoint) -> Reader:
        """Open the reader of a checkpoint that has a processor of images."""
        return ProcessorReader(checkpoint)


class ProcessorReader:
    """Encodes prompts and images with the checkpoint's processor, and appends the answers.

    Every image is decoded twice: in `encode` for the number of its image tokens, and in `collate`
    for its pixels.

    Raises:
        ConfigError: the checkpoint has no processor of images, or its processor needs a package
            that is not installed.
    """

    def __init__(self, checkpoint: OpenCheckpoint) -> None:
        self._checkpoint = checkpoint
        self._processor = _processor_of(checkpoint.folder)
        self.tokenizer: PreTrainedTokenizerBase = self._processor.tokenizer
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @cached_property
    def _image_tokens(self) -> set[str]:
        """Tokens that stand for an image: the processor's in prompts, and the model's."""
        token_id = getattr(self._checkpoint.config, "image_token_id", None)
        tokens = {getattr(self._processor, "image_token", None)}
        if token_id is not None:
            tokens.add(self.tokenizer.convert_ids_to_tokens(token_id))
        return {token for token in tokens if token}

    def encode(self, example: Example) -> EncodedExample:
        """Encode prompt, image tokens and answer as token ids.

        Raises:
            ConfigError: the text contains an image token, or an image cannot be processed.
        """
        for token in self._image_tokens:
            if token in example.prompt or token in example.target:
                raise ConfigError(
                    f"{example.id}: the text holds {token}, which stands for an image; correct the "
                    "row, or task.prompt and task.target"
                )
        if not example.prompt and not example.images:  # plain text without a chat turn
            return encode(self.tokenizer, example)
        message = Message("user", example.prompt, len(example.images))
        prompt = self._render([message], add_generation_prompt=True)
        pair = self._encode_answer(prompt, example)
        images = [image.open() for image in example.images]
        text = prompt + self._frame.around(example.target)
        try:
            [ids] = self._process(self._processor, [images] if images else None, [text])[
                "input_ids"
            ]
        except (ValueError, IndexError) as error:
            raise ConfigError(
                f"{example.id}: {len(images)} images do not fit their places in the prompt: "
                f"{one_line(error, 160)}; correct the row or task.prompt"
            ) from error
        end_id = pair.input_ids[-1]
        ids = [*ids] if ids[-1] == end_id else [*ids, end_id]
        # The processor replaces the image tokens of the prompt. The answer's tokens are last.
        start = len(ids) - len(pair.answer_ids)
        if ids[start:] != pair.answer_ids:
            raise ConfigError(
                f"{example.id}: the processor changes the tokens of the answer; "
                "set model.source to another checkpoint"
            )
        return EncodedExample(example.id, ids, start, example.images, prompt)

    @property
    def end_token(self) -> str:
        """The token that ends an answer."""
        return self._frame.end_token

    @property
    def _template_owner(self) -> Any:
        """The processor, or its tokenizer if only that has a chat template."""
        return self._processor if has_template(self._processor) else self.tokenizer

    def _render(self, messages: Sequence[Message], **options: Any) -> str:
        """Render messages with the chat template."""
        return render_messages(self._template_owner, messages, parts_first=True, **options)

    @cached_property
    def _frame(self) -> AnswerFrame:
        """The text that the chat template writes around an answer."""
        return find_answer_frame(
            self._render,
            end_tokens(self.tokenizer),
            self.tokenizer.eos_token,
            str(self._checkpoint.folder),
        )

    def _encode_answer(self, prompt: str, example: Example) -> EncodedPair:
        """Encode a rendered prompt with one token per image, and the answer of an example."""
        special = self._adds_special_tokens(prompt)
        return encode_answer(self.tokenizer, prompt, example, self._frame, special_tokens=special)

    def collate(
        self, batch: Sequence[EncodedExample], *, answers_only: bool = True
    ) -> dict[str, Tensor]:
        """Collate rows into a batch with padded tokens, token types and pixels.

        Token types and pixels come from the processor, for the rows that have images.
        """
        tensors = self._tokens(batch, answers_only=answers_only)
        return tensors | self._images(self._processor, batch, tensors["input_ids"])

    def collate_ahead(
        self, batch: Sequence[EncodedExample], *, answers_only: bool = True
    ) -> Mapping[str, Tensor]:
        """Collate as `collate` does, while a thread still runs the processor."""
        tensors = self._tokens(batch, answers_only=answers_only)
        if not any(row.images for row in batch):
            return tensors
        arguments = self._thread_processor, batch, tensors["input_ids"]
        images = processor_thread().submit(self._images, *arguments)
        return PendingBatch(
            tensors, images.result, {*self._processor.model_input_names, *_TOKEN_TYPES}
        )

    @cached_property
    def _thread_processor(self) -> Any:
        """A processor for the thread alone, since two threads cannot share a tokenizer."""
        return copy.deepcopy(self._processor)

    def _tokens(self, batch: Sequence[EncodedExample], *, answers_only: bool) -> dict[str, Tensor]:
        """Padded tokens of a batch."""
        tensors = collate(batch, self.tokenizer.pad_token_id, answers_only=answers_only)
        del tensors["position_ids"]  # some models number positions in several dimensions
        return tensors

    def _images(
        self, processor: Any, batch: Sequence[EncodedExample], input_ids: Tensor
    ) -> dict[str, Tensor]:
        """Token types and pixels of a batch, whose padded tokens are `input_ids` (B, L)."""
        indices = [index for index, row in enumerate(batch) if row.images]
        if not indices:
            return {}
        image_rows = [batch[index] for index in indices]
        images = [[image.open() for image in row.images] for row in image_rows]
        prompts = [row.prompt for row in image_rows]
        processed = self._process(
            *(processor, images, prompts),
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        # The token ids are dropped: `input_ids` has them already, with the answers.
        types = {name: processed.pop(name) for name in _TOKEN_TYPES if name in processed}
        lengths = processed.pop("attention_mask").sum(-1).tolist()
        del processed["input_ids"]
        tensors: dict[str, Tensor] = {}
        for name, values in types.items():
            tensors[name] = torch.zeros_like(input_ids)
            for index, prompt_types, length in zip(indices, values, lengths, strict=True):
                row_types = tensors[name][index, -len(batch[index].input_ids) :]
                # The last token of a prompt can be part of the answer's first token.
                shared = min(length, len(row_types))
                row_types[:shared] = prompt_types[-length:][:shared]
        dtype = self._checkpoint.dtype
        pixels = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in processed.items()
        }
        return tensors | pixels

    def _process(
        self, processor: Any, images: list[list[Image]] | None, prompts: list[str], **options: Any
    ) -> Any:
        """Run a processor on rendered prompts and their images."""
        special = self._adds_special_tokens(prompts[0])
        return processor(images=images, text=prompts, add_special_tokens=special, **options)

    def _adds_special_tokens(self, prompt: str) -> bool:
        """Whether the tokenizer adds special tokens: only if the template has written none."""
        begin = self.tokenizer.bos_token
        return not (begin and prompt.startswith(begin))


def _processor_of(folder: Path) -> Any:
    """Open the processor in a checkpoint's folder.

    Raises:
        ConfigError: the folder has no processor of images, or the processor needs a package that is
            not installed.
    """
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except (ImportError, OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{folder}: its processor cannot be used here: "
            f"{one_line(error, 160)}; install the package that it needs, or set model"
        ) from error
    if not hasattr(processor, "image_processor"):
        raise ConfigError(
            f"{folder}: the checkpoint has no processor of images (preprocessor_config.json); "
            "set model.source to a checkpoint with one"
        )
    return processor
