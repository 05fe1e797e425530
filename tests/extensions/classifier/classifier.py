"""Two families that sort into classes, texts and images, with a head made new: a plug-in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
)

from emloc.data.examples import Example, Examples
from emloc.data.image import LazyImage
from emloc.data.reader import OpenCheckpoint
from emloc.errors import ConfigError
from emloc.models.family import ModelFamily
from emloc.models.objectives import Batch, Objective


@dataclass(frozen=True)
class ClassRow:
    """An example with the index of its class, and what the model reads of it."""

    id: str
    label: int
    input_ids: tuple[int, ...] = ()
    image: LazyImage | None = None

    @property
    def length(self) -> int:
        """Tokens; images are all alike."""
        return len(self.input_ids) or 1


@dataclass(frozen=True)
class ClassAnswer:
    """What the model makes of one row."""

    id: str
    label: int
    predicted: int
    nll: float  # of the true class, in nats

    @property
    def line(self) -> dict[str, Any]:
        """Its line in predictions.jsonl."""
        return vars(self) | {"right": self.label == self.predicted}


@dataclass(frozen=True)
class Classes(Objective):
    """Cross-entropy of the true class; an item is a row."""

    score_names = ("accuracy", "loss")

    @property
    def key(self) -> list[Any]:
        """It has no settings; the classes are in the reader's key."""
        return ["classes"]

    def items(self, batch: Batch) -> Tensor:
        """Rows."""
        return torch.tensor(len(batch["labels"]))

    def loss(self, model: Any, batch: Batch, count: Tensor) -> Tensor:
        """Nats of the true class, summed over rows."""
        logits, labels = _logits(model, batch)
        return functional.cross_entropy(logits, labels, reduction="sum") / count

    def answers(self, model: Any, rows: Sequence[ClassRow], batch: Batch) -> list[ClassAnswer]:
        """The likeliest class of each row."""
        logits, labels = _logits(model, batch)
        nll = functional.cross_entropy(logits, labels, reduction="none")
        likeliest = logits.argmax(-1)
        return [
            ClassAnswer(row.id, row.label, int(likeliest[index]), float(nll[index]))
            for index, row in enumerate(rows)
        ]

    def summary(self, answers: Sequence[ClassAnswer], examples: Examples) -> dict[str, float]:
        """The share of rows that are right, and the mean loss."""
        right = sum(answer.label == answer.predicted for answer in answers)
        loss = sum(answer.nll for answer in answers)
        return {"accuracy": right / len(answers), "loss": loss / len(answers)}


def _logits(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return model(**inputs).logits.float(), batch["labels"]


@dataclass(frozen=True)
class ClassReading:
    """The classes by name, in the order of their indices, and what is read: text or image."""

    classes: tuple[str, ...]
    sees: bool

    @property
    def key(self) -> list[Any]:
        """See emloc.data.reader.Reading."""
        return ["image" if self.sees else "text", *self.classes]

    def reader(self, opened: OpenCheckpoint) -> TextClassReader | ImageClassReader:
        """See emloc.data.reader.Reading."""
        if self.sees:
            return ImageClassReader(self.classes, opened.config.image_size, opened.dtype)
        return TextClassReader(self.classes, opened.tokenizer)


@dataclass(frozen=True)
class TextClassReader:
    """The prompt is the text, the target the name of its class."""

    classes: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase

    def encode(self, example: Example) -> ClassRow:
        """The text's tokens."""
        ids = self.tokenizer(example.prompt).input_ids
        return ClassRow(example.id, _index(example, self.classes), tuple(ids))

    def collate(self, batch: Sequence[ClassRow], *, answers_only: bool = True) -> Batch:
        """input_ids and attention_mask (rows, tokens), padded behind; labels (rows,)."""
        rows = {"input_ids": [list(row.input_ids) for row in batch]}
        padded = self.tokenizer.pad(rows, padding_side="right", return_tensors="pt")
        made = {name: padded[name] for name in ("input_ids", "attention_mask")}
        return made | (_labels(batch) if answers_only else {})


@dataclass(frozen=True)
class ImageClassReader:
    """The image is what is read, the target the name of its class."""

    classes: tuple[str, ...]
    side: int
    dtype: torch.dtype

    def encode(self, example: Example) -> ClassRow:
        """The image, to be decoded with its batch."""
        if len(example.images) != 1:
            raise ConfigError(
                f"{example.id}: {len(example.images)} images, and this model reads one; set task"
            )
        return ClassRow(example.id, _index(example, self.classes), image=example.images[0])

    def collate(self, batch: Sequence[ClassRow], *, answers_only: bool = True) -> Batch:
        """pixel_values (rows, 3, side, side) in [-1, 1]; labels (rows,)."""
        pixels = torch.stack([self._pixels(row.image) for row in batch if row.image is not None])
        return {"pixel_values": pixels} | (_labels(batch) if answers_only else {})

    def _pixels(self, image: LazyImage) -> Tensor:
        resized = image.open().convert("RGB").resize((self.side, self.side))
        values = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
        return (values / 127.5 - 1).to(self.dtype)


def _index(example: Example, classes: Sequence[str]) -> int:
    if example.target not in classes:
        raise ConfigError(
            f"{example.id}: {example.target!r} is none of the classes {', '.join(classes)}; "
            "set model.classes, or task.target"
        )
    return list(classes).index(example.target)


def _labels(batch: Sequence[ClassRow]) -> Batch:
    return {"labels": torch.tensor([row.label for row in batch])}


@dataclass(frozen=True, kw_only=True)
class Classifier(ModelFamily):
    """What both families share: the classes, and a head made new for them."""

    unplanned = "sorts into classes"

    classes: list[str]  # the names that targets have, in the order of their indices
    head: str = "classifier"  # the module that is made new and trained whole

    @property
    def objective(self) -> Objective:
        """Cross-entropy of the class."""
        return Classes()

    @property
    def fresh(self) -> tuple[str, ...]:
        """The head."""
        return (self.head,)

    @property
    def changes(self) -> dict[str, Any]:
        """As many outputs as classes, by name."""
        named = dict(enumerate(self.classes))
        return {"id2label": named, "label2id": {name: index for index, name in named.items()}}


@dataclass(frozen=True, kw_only=True)
class EncoderClassifier(Classifier):
    """Any `AutoModelForSequenceClassification`."""

    auto = AutoModelForSequenceClassification

    max_length: int  # tokens; a longer example is left out and counted

    @property
    def reader_settings(self) -> ClassReading:
        """Texts."""
        return ClassReading(tuple(self.classes), sees=False)

    @property
    def longest(self) -> int:
        """Tokens of an example, at most."""
        return self.max_length


@dataclass(frozen=True, kw_only=True)
class ImageClassifier(Classifier):
    """Any `AutoModelForImageClassification` of square images scaled to [-1, 1], as a ViT."""

    auto = AutoModelForImageClassification

    @property
    def reader_settings(self) -> ClassReading:
        """Images."""
        return ClassReading(tuple(self.classes), sees=True)
