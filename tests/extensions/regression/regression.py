"""A plug-in: a model family that learns to predict vectors from texts by flow matching.

A RoBERTa reads the text. The flow moves from noise z to the vector x along x_t = (1 - t) z + t x.
The model predicts x from x_t, t and the text; the velocity is (x - x_t) / (1 - t). Training draws
new noise and times at each step; in evaluation the noise depends only on the id of the row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, RobertaModel, RobertaPreTrainedModel

from emloc.data.examples import Example, Examples
from emloc.data.reader import OpenCheckpoint
from emloc.errors import ConfigError
from emloc.models.family import ModelFamily
from emloc.models.objectives import Batch, Objective


class FlowModel(RobertaPreTrainedModel):
    """A RoBERTa encoder and two layers that also read the point and the time of the flow."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.roberta = RobertaModel(config, add_pooling_layer=False)
        self.entry = nn.Linear(config.hidden_size + config.num_labels + 1, config.hidden_size)
        self.exit = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @classmethod
    def from_config(cls, config: Any, dtype: torch.dtype) -> FlowModel:
        """Build a model with random weights, like the classes `Auto...` of transformers."""
        model: FlowModel = cls._from_config(config, dtype=dtype)
        return model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, point: Tensor, time: Tensor
    ) -> Tensor:
        """Predict the end (rows, size) of the flow from `point` (rows, size), `time` (rows, 1)."""
        hidden = self.roberta(input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask[..., None].to(hidden.dtype)
        text = (hidden * weight).sum(1) / weight.sum(1)
        end: Tensor = self.exit(self.entry(torch.cat([text, point, time], dim=-1)).tanh())
        return end


@dataclass(frozen=True)
class VectorRow:
    """The tokens of a text, and the target vector."""

    id: str
    input_ids: tuple[int, ...]
    target: tuple[float, ...]

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.input_ids)

    @property
    def noise(self) -> Tensor:
        """The start (size,) of the flow in calibration and evaluation; depends on the id."""
        seed = int.from_bytes(hashlib.sha256(self.id.encode()).digest()[:4])
        return torch.randn(len(self.target), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class VectorAnswer:
    """The end point of the flow of one row, and its error."""

    id: str
    reached: list[float]
    error: float  # mean squared difference from the target

    @property
    def line(self) -> dict[str, Any]:
        """The line of this row in predictions.jsonl."""
        return vars(self)


@dataclass(frozen=True)
class Flow(Objective):
    """Mean squared error of the predicted end point, averaged over rows."""

    score_names = ("error",)

    steps: int  # steps of Euler's method from noise to answer

    @property
    def key(self) -> list[Any]:
        """The name of the objective, and the number of steps, which changes the scores."""
        return ["flow", self.steps]

    def items(self, batch: Batch) -> Tensor:
        """The number of rows in the batch."""
        return torch.tensor(len(batch["target"]))

    def loss(self, model: Any, batch: Batch, count: Tensor) -> Tensor:
        """The loss at one random point on the path of each row, summed over rows / `count`."""
        target = batch["target"]
        noise, time = torch.randn_like(target), torch.rand_like(target[:, :1])
        end = _end(model, batch, (1 - time) * noise + time * target, time)
        return (end - target).square().mean(-1).sum() / count

    def answers(self, model: Any, rows: Sequence[VectorRow], batch: Batch) -> list[VectorAnswer]:
        """Follow the flow of each row from its noise with Euler's method."""
        point = torch.stack([row.noise for row in rows]).to(batch["target"].device)
        for step in range(self.steps):
            time = torch.full_like(point[:, :1], step / self.steps)
            velocity = (_end(model, batch, point, time) - point) / (1 - time)
            point = point + velocity / self.steps
        errors = (point - batch["target"]).square().mean(-1)
        return [
            VectorAnswer(row.id, point[index].tolist(), float(errors[index]))
            for index, row in enumerate(rows)
        ]

    def summary(self, answers: Sequence[VectorAnswer], examples: Examples) -> dict[str, float]:
        """The mean squared error over all rows."""
        return {"error": sum(answer.error for answer in answers) / len(answers)}


def _end(model: Any, batch: Batch, point: Tensor, time: Tensor) -> Tensor:
    end: Tensor = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        point=point,
        time=time,
    )
    return end.float()


@dataclass(frozen=True)
class VectorReaderSettings:
    """The number of components of a target vector."""

    size: int

    @property
    def key(self) -> list[Any]:
        """See emloc.data.reader.ReaderSettings."""
        return ["vector", self.size]

    def reader(self, opened: OpenCheckpoint) -> VectorReader:
        """See emloc.data.reader.ReaderSettings."""
        return VectorReader(self.size, opened.tokenizer)


@dataclass(frozen=True)
class VectorReader:
    """Reads the prompt as the text, and the target as numbers separated by spaces."""

    size: int
    tokenizer: PreTrainedTokenizerBase

    def encode(self, example: Example) -> VectorRow:
        """Tokenize the text and parse the target vector.

        Raises:
            ConfigError: the target is not a vector of `size` numbers.
        """
        try:
            target = tuple(float(number) for number in example.target.split())
        except ValueError as error:
            raise ConfigError(f"{example.id}: {error}; set task.target") from error
        if len(target) != self.size:
            raise ConfigError(
                f"{example.id}: {len(target)} numbers in place of {self.size}; "
                f"set model.size={len(target)}, or task.target"
            )
        return VectorRow(example.id, tuple(self.tokenizer(example.prompt).input_ids), target)

    def collate(self, batch: Sequence[VectorRow], *, answers_only: bool = True) -> Batch:
        """A batch with the target (rows, size), or for calibration the point half-way to it."""
        rows = {"input_ids": [list(row.input_ids) for row in batch]}
        padded = self.tokenizer.pad(rows, padding_side="right", return_tensors="pt")
        inputs = {name: padded[name] for name in ("input_ids", "attention_mask")}
        target = torch.tensor([row.target for row in batch])
        if answers_only:
            return inputs | {"target": target}
        noise = torch.stack([row.noise for row in batch])
        time = torch.full_like(target[:, :1], 0.5)
        return inputs | {"point": (noise + target) / 2, "time": time}


@dataclass(frozen=True, kw_only=True)
class VectorModel(ModelFamily):
    """A model family that maps texts to vectors by flow matching."""

    auto = FlowModel
    unplanned = "learns vectors"

    size: int  # components of a target vector
    steps: int = 8  # steps of Euler's method from noise to answer
    max_length: int  # tokens; a longer example is left out and counted

    @property
    def reader_settings(self) -> VectorReaderSettings:
        """Settings of the reader of texts and vectors."""
        return VectorReaderSettings(self.size)

    @property
    def objective(self) -> Objective:
        """Flow matching with `steps` steps in evaluation."""
        return Flow(self.steps)

    @property
    def length_limit(self) -> int:
        """Largest number of tokens in an example."""
        return self.max_length

    @property
    def fresh_modules(self) -> tuple[str, ...]:
        """Names of the modules that a RoBERTa checkpoint lacks."""
        return ("entry", "exit")

    @property
    def config_changes(self) -> dict[str, Any]:
        """Changes of the configuration: one output for each component of the vector."""
        return {"num_labels": self.size}
