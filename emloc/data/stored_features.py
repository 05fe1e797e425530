"""Batches with stored features of images in place of pixels, so that no image is opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from emloc.data.collate import EncodedRow
from emloc.data.examples import Example
from emloc.data.pending import PendingBatch, pin, processor_thread
from emloc.data.prompts import EncodedExample
from emloc.data.reader import Reader
from emloc.errors import ConfigError
from emloc.runtime.digest import digest

# Name in a batch, and in the files, of the features; models read pixels under this name.
FEATURES = "pixel_values"
# What else a language model reads about its images: Qwen models number positions by it.
LANGUAGE_INPUTS = ("image_grid_thw",)


@dataclass(frozen=True)
class FeatureLayout:
    """How the features of a row are laid out in one tensor (..., levels x d)."""

    is_list: bool = False  # whether the model's method returns a list, one tensor for each image
    # 1, and one for each block of the vision tower whose features enter a block of the decoder
    levels: int = 1
    # Inputs with one value for each token -> whether it is 1 at image tokens; else it is 0 there.
    token_types: Mapping[str, bool] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, Any]:
        """The fields as values for JSON."""
        return asdict(self)


class FeatureReader(Protocol):
    """Reads the stored parts of the images of one row."""

    def __contains__(self, row: str) -> bool:
        """Whether the images of a row are stored."""

    def read(self, row: str, place: int) -> dict[str, Tensor]:
        """Return the parts by name: `FEATURES`, and some of `LANGUAGE_INPUTS`."""


@dataclass(frozen=True)
class FeatureFiles:
    """Stored features of the images of some rows."""

    layout: FeatureLayout
    reader: FeatureReader


# Returns the files; None before they are written, when only shapes are asked for.
FindFeatures = Callable[[], FeatureFiles | None]


def images_key(row: EncodedExample) -> str:
    """Return the key of the features of a row: rows with the same images have the same."""
    return digest([image.key for image in row.images])


@dataclass(frozen=True)
class StoredFeaturesReader:
    """Encodes as the reader of a model family, and collates stored features in place of pixels."""

    reader: Reader
    find: FindFeatures
    image_token: int  # id of the token that stands for a piece of an image

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the reader."""
        return self.reader.tokenizer  # type: ignore[attr-defined]

    def encode(self, example: Example) -> EncodedRow:
        """Encode an example; see `Reader.encode`."""
        return self.reader.encode(example)

    def collate(
        self, batch: Sequence[EncodedExample], *, answers_only: bool = True
    ) -> dict[str, Any]:
        """Collate rows as `Reader.collate` does, with features under the name of the pixels."""
        return {**self.collate_ahead(batch, answers_only=answers_only)}

    def collate_ahead(
        self, batch: Sequence[EncodedExample], *, answers_only: bool = True
    ) -> Mapping[str, Any]:
        """Collate as `collate` does, while a thread still reads the features.

        Raises:
            ConfigError: the images of a row are not stored.
        """
        text_rows = [replace(row, images=()) for row in batch]
        tensors = self.reader.collate(text_rows, answers_only=answers_only)
        keys = [images_key(row) for row in batch if row.images]
        if not keys:
            return tensors
        files = self.find()
        if files is None or any(key not in files.reader for key in keys):
            raise ConfigError(
                "train.features=stored: a row has images without stored features; "
                "set train.features=computed"
            )
        has_images = torch.tensor([bool(row.images) for row in batch])
        is_image = (tensors["input_ids"] == self.image_token) & has_images[:, None]
        types = {
            name: is_image.long() if marks_images else torch.zeros_like(tensors["input_ids"])
            for name, marks_images in files.layout.token_types.items()
        }
        parts = processor_thread().submit(_read, files.reader, keys)
        return PendingBatch(tensors | types, parts.result, (FEATURES, *LANGUAGE_INPUTS))


def _read(reader: FeatureReader, keys: Sequence[str]) -> dict[str, Tensor]:
    """Return the parts of some rows, each in one tensor, row after row."""
    rows = [reader.read(key, 0) for key in keys]
    return {name: pin(torch.cat([row[name] for row in rows])) for name in rows[0]}
