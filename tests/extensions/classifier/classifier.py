"""A plug-in with two model families that classify texts or images with a newly initialised head."""

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
    """The tokens or the image of one example, with the index of its class as the label."""

    id: str
    label: int
    input_ids: tuple[int, ...] = ()
    image: LazyImage | None = None

    @property
    def length(self) -> int:
        """Number of tokens; 1 for images, which all have the same size."""
        return len(self.input_ids) or 1


@dataclass(frozen=True)
class ClassAnswer:
    """The class that the model predicts for one row, beside the true class."""

    id: str
    label: int
    predicted: int
    nll: float  # negative log-likelihood of the true class, in nats

    @property
    def line(self) -> dict[str, Any]:
        """The line of this row in predictions.jsonl."""
        return vars(self) | {"right": self.label == self.predicted}


@dataclass(frozen=True)
class Classes(Objective):
    """Cross-entropy of the true class, averaged over rows."""

    score_names = ("accuracy", "loss")

    @property
    def key(self) -> list[Any]:
        """A constant: the objective has no settings, and the reader's key contains the classes."""
        return ["classes"]

    def items(self, batch: Batch) -> Tensor:
        """The number of rows in the batch."""
        return torch.tensor(len(batch["labels"]))

    def loss(self, model: Any, batch: Batch, count: Tensor) -> Tensor:
        """The cross-entropy of the batch in nats, summed over rows and divided by `count`."""
        logits, labels = _logits(model, batch)
        return functional.cross_entropy(logits, labels, reduction="sum") / count

    def answers(self, model: Any, rows: Sequence[ClassRow], batch: Batch) -> list[ClassAnswer]:
        """The most likely class of each row."""
        logits, labels = _logits(model, batch)
        nll = functional.cross_entropy(logits, labels, reduction="none")
        likeliest = logits.argmax(-1)
        return [
            ClassAnswer(row.id, row.label, int(likeliest[index]), float(nll[index]))
            for index, row in enumerate(rows)
        ]

    def summary(self, answers: Sequence[ClassAnswer], examples: Examples) -> dict[str, float]:
        """The share of rows with a correct prediction, and the mean loss."""
        right = sum(answer.label == answer.predicted for answer in answers)
        loss = sum(answer.nll for answer in answers)
        return {"accuracy": right / len(answers), "loss": loss / len(answers)}


def _logits(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return model(**inputs).logits.float(), batch["labels"]


@dataclass(frozen=True)
class ClassReaderSettings:
    """Names of the classes in the order of their indices, and whether the inputs are images."""

    classes: tuple[str, ...]
    reads_images: bool

    @property
    def key(self) -> list[Any]:
        """See emloc.data.reader.ReaderSettings."""
        return ["image" if self.reads_images else "text", *self.classes]

    def reader(self, opened: OpenCheckpoint) -> TextClassReader | ImageClassReader:
        """See emloc.data.reader.ReaderSettings."""
        if self.reads_images:
            return ImageClassReader(self.classes, opened.config.image_size, opened.dtype)
        return TextClassReader(self.classes, opened.tokenizer)


@dataclass(frozen=True)
class TextClassReader:
    """Reads the prompt as the text to classify and the target as the name of its class."""

    classes: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase

    def encode(self, example: Example) -> ClassRow:
        """Tokenize the text and look up the index of its class."""
        ids = self.tokenizer(example.prompt).input_ids
        return ClassRow(example.id, _index(example, self.classes), tuple(ids))

    def collate(self, batch: Sequence[ClassRow], *, answers_only: bool = True) -> Batch:
        """A batch: input_ids, attention_mask (rows, tokens), right-padded; labels (rows,)."""
        rows = {"input_ids": [list(row.input_ids) for row in batch]}
        padded = self.tokenizer.pad(rows, padding_side="right", return_tensors="pt")
        inputs = {name: padded[name] for name in ("input_ids", "attention_mask")}
        return inputs | (_labels(batch) if answers_only else {})


@dataclass(frozen=True)
class ImageClassReader:
    """Reads the image to classify, and the target as the name of its class."""

    classes: tuple[str, ...]
    side: int
    dtype: torch.dtype

    def encode(self, example: Example) -> ClassRow:
        """Pair the image with the index of its class; `collate` decodes the image."""
        if len(example.images) != 1:
            raise ConfigError(
                f"{example.id}: {len(example.images)} images, and this model reads one; set task"
            )
        return ClassRow(example.id, _index(example, self.classes), image=example.images[0])

    def collate(self, batch: Sequence[ClassRow], *, answers_only: bool = True) -> Batch:
        """A batch: pixel_values (rows, 3, side, side) in [-1, 1]; labels (rows,)."""
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
    """The settings of both families: the classes, and the newly initialised head."""

    unplanned = "sorts into classes"

    classes: list[str]  # class names as in the targets, in the order of their indices
    head: str = "classifier"  # name of the module that is initialised at random and fully trained

    @property
    def objective(self) -> Objective:
        """Cross-entropy of the true class."""
        return Classes()

    @property
    def fresh_modules(self) -> tuple[str, ...]:
        """The name of the head, which no checkpoint contains."""
        return (self.head,)

    @property
    def config_changes(self) -> dict[str, Any]:
        """Changes of the configuration: one output for each class name."""
        id2label = dict(enumerate(self.classes))
        label2id = {name: index for index, name in id2label.items()}
        return {"id2label": id2label, "label2id": label2id}


@dataclass(frozen=True, kw_only=True)
class EncoderClassifier(Classifier):
    """A text classifier that `AutoModelForSequenceClassification` can load."""

    auto = AutoModelForSequenceClassification

    max_length: int  # tokens; a longer example is left out and counted

    @property
    def reader_settings(self) -> ClassReaderSettings:
        """Settings of the reader of texts."""
        return ClassReaderSettings(tuple(self.classes), reads_images=False)

    @property
    def length_limit(self) -> int:
        """Largest number of tokens in an example."""
        return self.max_length


@dataclass(frozen=True, kw_only=True)
class ImageClassifier(Classifier):
    """An image classifier such as a ViT that `AutoModelForImageClassification` can load.

    Images are square, with values scaled to [-1, 1].
    """

    auto = AutoModelForImageClassification

    @property
    def reader_settings(self) -> ClassReaderSettings:
        """Settings of the reader of images."""
        return ClassReaderSettings(tuple(self.classes), reads_images=True)
