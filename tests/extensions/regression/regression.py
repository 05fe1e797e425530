"""A family that learns vectors by flow matching, through a RoBERTa that reads the text: a plug-in.

A vector x is reached from noise z along x_t = (1 - t) z + t x. From x_t, t and the text the model
predicts x, and so the velocity (x - x_t) / (1 - t). Noise and times are drawn anew at every step of
a training; in evaluation the noise depends on a row's name alone.
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
    """A RoBERTa that reads the text, and two layers behind it that also see point and time."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.roberta = RobertaModel(config, add_pooling_layer=False)
        self.entry = nn.Linear(config.hidden_size + config.num_labels + 1, config.hidden_size)
        self.exit = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @classmethod
    def from_config(cls, config: Any, dtype: torch.dtype) -> FlowModel:
        """As the classes `Auto...` of transformers build theirs."""
        model: FlowModel = cls._from_config(config, dtype=dtype)
        return model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, point: Tensor, time: Tensor
    ) -> Tensor:
        """Where (rows, size) the flow leads from `point` (rows, size) at `time` (rows, 1)."""
        hidden = self.roberta(input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask[..., None].to(hidden.dtype)
        text = (hidden * weight).sum(1) / weight.sum(1)
        end: Tensor = self.exit(self.entry(torch.cat([text, point, time], dim=-1)).tanh())
        return end


@dataclass(frozen=True)
class VectorRow:
    """The tokens of a text, and the vector that goes with it."""

    id: str
    input_ids: tuple[int, ...]
    target: tuple[float, ...]

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.input_ids)

    @property
    def noise(self) -> Tensor:
        """Where its flow starts outside training (size,)."""
        seed = int.from_bytes(hashlib.sha256(self.id.encode()).digest()[:4])
        return torch.randn(len(self.target), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class VectorAnswer:
    """Where the flow of one row ended."""

    id: str
    reached: list[float]
    error: float  # mean square of the difference from the target

    @property
    def line(self) -> dict[str, Any]:
        """Its line in predictions.jsonl."""
        return vars(self)


@dataclass(frozen=True)
class Flow(Objective):
    """Mean square of the error in the end of the flow; an item is a row."""

    score_names = ("error",)

    steps: int  # of Euler's method from noise to answer

    @property
    def key(self) -> list[Any]:
        """The steps decide the scores."""
        return ["flow", self.steps]

    def items(self, batch: Batch) -> Tensor:
        """Rows."""
        return torch.tensor(len(batch["target"]))

    def loss(self, model: Any, batch: Batch, count: Tensor) -> Tensor:
        """At one random point of each row's path."""
        target = batch["target"]
        noise, time = torch.randn_like(target), torch.rand_like(target[:, :1])
        end = _end(model, batch, (1 - time) * noise + time * target, time)
        return (end - target).square().mean(-1).sum() / count

    def answers(self, model: Any, rows: Sequence[VectorRow], batch: Batch) -> list[VectorAnswer]:
        """Where `steps` steps lead."""
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
        """The mean error."""
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
class VectorReading:
    """How many numbers a target has."""

    size: int

    @property
    def key(self) -> list[Any]:
        """See emloc.data.reader.Reading."""
        return ["vector", self.size]

    def reader(self, opened: OpenCheckpoint) -> VectorReader:
        """See emloc.data.reader.Reading."""
        return VectorReader(self.size, opened.tokenizer)


@dataclass(frozen=True)
class VectorReader:
    """The prompt is the text, the target its numbers with spaces between them."""

    size: int
    tokenizer: PreTrainedTokenizerBase

    def encode(self, example: Example) -> VectorRow:
        """Tokens and numbers."""
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
        """Tokens, and the target (rows, size), or for calibration a point half-way to it."""
        rows = {"input_ids": [list(row.input_ids) for row in batch]}
        padded = self.tokenizer.pad(rows, padding_side="right", return_tensors="pt")
        made = {name: padded[name] for name in ("input_ids", "attention_mask")}
        target = torch.tensor([row.target for row in batch])
        if answers_only:
            return made | {"target": target}
        noise = torch.stack([row.noise for row in batch])
        time = torch.full_like(target[:, :1], 0.5)
        return made | {"point": (noise + target) / 2, "time": time}


@dataclass(frozen=True, kw_only=True)
class VectorModel(ModelFamily):
    """Texts to vectors, by flow matching."""

    auto = FlowModel
    unplanned = "learns vectors"

    size: int  # numbers of a target
    steps: int = 8  # from noise to answer
    max_length: int  # tokens; a longer example is left out and counted

    @property
    def reader_settings(self) -> VectorReading:
        """Texts and numbers."""
        return VectorReading(self.size)

    @property
    def objective(self) -> Objective:
        """Flow matching."""
        return Flow(self.steps)

    @property
    def longest(self) -> int:
        """Tokens of an example, at most."""
        return self.max_length

    @property
    def fresh(self) -> tuple[str, ...]:
        """What no RoBERTa has."""
        return ("entry", "exit")

    @property
    def changes(self) -> dict[str, Any]:
        """As many outputs as numbers."""
        return {"num_labels": self.size}
