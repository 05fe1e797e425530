"""Models that read images and text and write text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerBase

from emloc.data.collate import collate
from emloc.data.examples import Example
from emloc.data.prompts import EncodedExample, encode
from emloc.data.reader import OpenCheckpoint, Reader, ReaderSettings
from emloc.errors import ConfigError
from emloc.models.generative import GenerativeModel

# What a processor says of each token besides which it is.
_OF_TOKENS = ("token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True, kw_only=True)
class VisionLanguageModel(GenerativeModel):
    """Any `AutoModelForImageTextToText` whose blocks are made of `nn.Linear`.

    Its checkpoint's own processor cuts images up and puts their places into the prompt.
    """

    auto = AutoModelForImageTextToText

    @property
    def reader_settings(self) -> ReaderSettings:
        """Through the checkpoint's processor."""
        return ProcessorReaderSettings()


@dataclass(frozen=True)
class ProcessorReaderSettings:
    """The checkpoint's own processor, whose settings lie with it."""

    @property
    def key(self) -> list[Any]:
        """See Reading."""
        return ["processor"]

    def reader(self, opened: OpenCheckpoint) -> Reader:
        """See Reading."""
        return ProcessorReader(opened)


class ProcessorReader:
    """Prompts and images through a transformers processor, answers behind them.

    An image is decoded twice: for the number of its places, and for its pixels when its batch is
    due.

    Raises:
        ConfigError: the checkpoint has no processor of images, or one that cannot be used here.
    """

    def __init__(self, opened: OpenCheckpoint) -> None:
        self._opened = opened
        self._processor = _processor_of(opened.folder)
        self.tokenizer: PreTrainedTokenizerBase = self._processor.tokenizer
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @cached_property
    def _image_tokens(self) -> set[str]:
        """The word for an image in a prompt, and the token whose place its features take."""
        place = getattr(self._opened.config, "image_token_id", None)
        found = {getattr(self._processor, "image_token", None)}
        if place is not None:
            found.add(self.tokenizer.convert_ids_to_tokens(place))
        return {token for token in found if token}

    def encode(self, example: Example) -> EncodedExample:
        """See Reader."""
        for token in self._image_tokens:
            if token in example.prompt or token in example.target:
                raise ConfigError(
                    f"{example.id}: the text holds {token}, which stands for an image; correct the "
                    "row, or task.prompt and task.target"
                )
        if not example.prompt and not example.images:  # running text, and nobody's turn
            return encode(self.tokenizer, example)
        places = [{"type": "image"} for _ in example.images]
        content = [*places, {"type": "text", "text": example.prompt}]
        turns = [{"role": "user", "content": content}]
        prompt = self._processor.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
        images = [one.open() for one in example.images]
        try:
            [ids] = self._read([images] if images else None, [prompt])["input_ids"]
        except (ValueError, IndexError) as error:
            raise ConfigError(
                f"{example.id}: {len(images)} images do not fit their places in the prompt: "
                f"{' '.join(str(error).split())[:160]}; correct the row or task.prompt"
            ) from error
        answer = self.tokenizer(example.target, add_special_tokens=False).input_ids
        whole = [*ids, *answer, self.tokenizer.eos_token_id]
        return EncodedExample(example.id, whole, len(ids), example.images, prompt)

    def collate(
        self, batch: Sequence[EncodedExample], *, answers_only: bool = True
    ) -> dict[str, Tensor]:
        """See Reader."""
        made = collate(batch, self.tokenizer.pad_token_id, answers_only=answers_only)
        del made["position_ids"]  # some count positions in more than one dimension
        rows = [row for row, one in enumerate(batch) if one.images]
        if not rows:
            return made
        seen = [batch[row] for row in rows]
        images = [[picture.open() for picture in one.images] for one in seen]
        prompts = [one.prompt for one in seen]
        # Of the tokens only what is said about them: their ids are there already.
        found = self._read(images, prompts, padding=True, padding_side="left", return_tensors="pt")
        kinds = {name: found.pop(name) for name in _OF_TOKENS if name in found}
        lengths = found.pop("attention_mask").sum(-1).tolist()
        del found["input_ids"]
        for name, values in kinds.items():
            made[name] = torch.zeros_like(made["input_ids"])
            for row, of_prompt, length in zip(rows, values, lengths, strict=True):
                start = made["input_ids"].shape[1] - len(batch[row].input_ids)
                made[name][row, start : start + length] = of_prompt[-length:]
        dtype = self._opened.dtype
        pixels = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in found.items()
        }
        return made | pixels

    def _read(self, images: list[list[Image]] | None, prompts: list[str], **how: Any) -> Any:
        """What the processor makes of rendered prompts: the token that begins a text, once.

        A chat template may have written it, and the processor would put another before it.
        """
        begin = self.tokenizer.bos_token
        begun = bool(begin) and prompts[0].startswith(begin)
        return self._processor(images=images, text=prompts, add_special_tokens=not begun, **how)


def _processor_of(folder: Path) -> Any:
    """The checkpoint's processor.

    Raises:
        ConfigError: it has none, or one that needs a package that is not there.
    """
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except (ImportError, OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{folder}: its processor cannot be used here: "
            f"{' '.join(str(error).split())[:160]}; install what it asks for, or set model"
        ) from error
    if not hasattr(processor, "image_processor"):
        raise ConfigError(
            f"{folder}: has no processor of images (preprocessor_config.json); "
            "set model.source to a checkpoint with one"
        )
    return processor
