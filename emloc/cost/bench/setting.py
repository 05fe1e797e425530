"""The models, batches and clocks that all benchmarks share.

Weights are random: they cost time and memory as trained ones do. On a machine without a GPU the
same code runs on a model of the same parts, too small for its figures to mean anything: there are
no targets then, and no figures of device memory.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from emloc.adapters.training_inputs import TrainingInputs
from emloc.calibration.blockwise import Batch
from emloc.config.compose import compose
from emloc.data.examples import Examples
from emloc.models.checkpoint.source import Source
from emloc.runtime.distributed import own_device
from emloc.stages.run_config import RunConfig, build

# What is left of a language model where there is no GPU, and of a vision tower.
SMALL_TEXT = (
    *("hidden_size=64", "intermediate_size=128", "num_hidden_layers=2", "vocab_size=512"),
    *("num_attention_heads=4", "num_key_value_heads=2"),
)
SMALL_VISION = (
    "model.shape.vision_config.hidden_size=32",
    "model.shape.vision_config.intermediate_size=64",
    "model.shape.vision_config.num_hidden_layers=2",
    "model.shape.vision_config.num_attention_heads=2",
    "model.shape.vision_config.image_size=[56,56]",
    "model.shape.image_token_id=511",
    "model.excluded={}",
)
# One sample: an image in tiles, and a text whose second half is the answer.
TILES, TEXT, ANSWER = 7, 256, 128


@dataclass(frozen=True)
class RandomRow:
    """A sample to train on, before it is made: its length in tokens, and the seed it comes from."""

    length: int
    seed: int

    @property
    def id(self) -> str:
        """Its name."""
        return str(self.seed)


@dataclass(frozen=True)
class BenchSetup:
    """A model, of its true shape where there is a GPU, and samples to go with it."""

    model: str
    overrides: tuple[str, ...] = ()

    @cached_property
    def device(self) -> torch.device:
        """Where it runs."""
        return own_device()

    @property
    def full(self) -> bool:
        """Whether the model has its true size."""
        return self.device.type == "cuda"

    @cached_property
    def run_config(self) -> RunConfig:
        """The configuration, as the command line would give it."""
        fixed = ("model.weights=random", "train=steps500", "train.batch=1", "train.accumulate=1")
        small = () if self.full else _small(self.model)
        last = ("train.log_every=1", "train.save_every=100000", "tracker=none")
        return build(compose([f"model={self.model}", *fixed, *small, *self.overrides, *last]))

    @cached_property
    def source(self) -> Source:
        """The model."""
        return self.run_config.model.open()

    @property
    def training_inputs(self) -> TrainingInputs:
        """How an adapter is trained; its samples are those of `rows`."""
        run_config, adapter = self.run_config, self.run_config.adapter
        assert adapter.trains  # the method of a benchmark is one that trains
        none = Examples("random", ())
        layers, length = tuple(run_config.model.adapted(self.source)), self.length
        return TrainingInputs(
            adapter, run_config.lora, layers, none, length, run_config.train, run_config.seed
        )

    def rows(self) -> list[RandomRow]:
        """One sample a step."""
        return [RandomRow(self.length, seed) for seed in range(self.run_config.train.steps)]

    @property
    def tiles(self) -> int:
        """Of one sample."""
        return TILES if self.full else 2

    @property
    def text(self) -> int:
        """Tokens of one sample that are no image."""
        return TEXT if self.full else 16

    @property
    def answer(self) -> int:
        """Of these, tokens that are learnt."""
        return ANSWER if self.full else 8

    @property
    def length(self) -> int:
        """Tokens of one sample."""
        return self.tiles * self._tokens_of_a_tile + self.text

    @property
    def _tokens_of_a_tile(self) -> int:
        vision = self.source.config.vision_config
        side = vision.image_size[0] // vision.patch_size[0]
        return int((side * self.source.config.downsample_ratio) ** 2)

    def batch(self, seed: int) -> dict[str, Tensor]:
        """One sample as the model takes it, without labels."""
        draw = torch.Generator().manual_seed(seed)
        config = self.source.config
        pixels = config.vision_config.image_size
        image = torch.full((1, self.length - self.text), config.image_token_id)
        text = torch.randint(0, config.image_token_id, (1, self.text), generator=draw)
        ids = torch.cat([image, text], dim=1)
        tiles = torch.randn(self.tiles, 3, *pixels, generator=draw)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": tiles.to(self.source.dtype),
        }

    def learnt(self, seed: int) -> dict[str, Tensor]:
        """The same with labels on the answer, and logits from there on alone."""
        batch = self.batch(seed)
        labels = batch["input_ids"].clone()
        labels[:, : -self.answer] = -100
        kept = torch.arange(self.length)[-self.answer - 1 :]
        return batch | {"labels": labels[:, kept], "logits_to_keep": kept}


def _small(model: str) -> tuple[str, ...]:
    """Overrides that leave next to nothing of a model."""
    shape = compose([f"model={model}"]).model.shape
    sees = "vision_config" in shape
    where = "model.shape.text_config" if sees else "model.shape"
    text = tuple(f"{where}.{one}" for one in SMALL_TEXT)
    # Of whole numbers only, tokens that begin and end a text are beyond so few words.
    known = shape.text_config if sees else shape
    ends = tuple(f"{where}.{one}=null" for one in ("bos_token_id", "eos_token_id") if one in known)
    return (*text, *ends, "lora=r4", *(SMALL_VISION if sees else ()))


@dataclass(frozen=True)
class RandomSamples:
    """Calibration samples of a setting."""

    setting: BenchSetup
    count: int

    @property
    def key(self) -> list[Any]:
        """What a stage that reads them depends on."""
        return [self.setting.model, self.setting.length, self.count]

    @property
    def ids(self) -> list[str]:
        """Their names."""
        return [str(index) for index in range(self.count)]

    def batches(self, source: Source) -> Sequence[Batch]:
        """One sample each."""
        return [self.setting.batch(index) for index in range(self.count)]


def fresh(device: torch.device) -> None:
    """Begin to measure: nothing left of what was before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gb(device: torch.device) -> float:
    """10^9 bytes allocated at most on the device; nan where there is none to ask."""
    if device.type != "cuda":
        return float("nan")
    return torch.cuda.max_memory_allocated(device) / 1e9


def reserved_gb(device: torch.device) -> float:
    """10^9 bytes taken from the device at most; nan where there is none to ask."""
    if device.type != "cuda":
        return float("nan")
    return torch.cuda.max_memory_reserved(device) / 1e9


def now(device: torch.device) -> float:
    """Seconds, when all that was started is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """How long it takes."""
    start = now(device)
    work()
    return now(device) - start


def out_of_memory(error: BaseException) -> bool:
    """Whether the device, or what a run may use of it, is full."""
    while not isinstance(error, torch.cuda.OutOfMemoryError):
        if error.__cause__ is None:
            return False
        error = error.__cause__
    return True
