"""Models, batches and measurements that all benchmarks share.

Weights are random, since random weights cost as much time and memory as trained ones. On a machine
without a GPU the same code runs on a model with the same structure but tiny layers. Its figures
mean nothing, so there are no targets and no figures of device memory then.
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
from emloc.calibration.offload import StateLimits, state_limits
from emloc.config.compose import compose
from emloc.cost.plan.features import trained_source
from emloc.data.examples import Examples
from emloc.models.checkpoint.source import Source
from emloc.runtime.distributed import own_device
from emloc.runtime.memory import usable_device_bytes
from emloc.stages.run_config import RunConfig, build

# Sizes of the language model and of the vision tower on a machine without a GPU.
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
# Shape of one sample: tiles of an image, tokens of text, and answer tokens at the end of the text.
TILES, TEXT, ANSWER = 7, 256, 128


@dataclass(frozen=True)
class RandomRow:
    """A training row that is still to be generated: its length in tokens and its random seed.

    The answer begins at the token `answer_start`.
    """

    length: int
    seed: int
    answer_start: int = 0
    images: tuple[str, ...] = ("random",)

    @property
    def id(self) -> str:
        """Name of the row."""
        return str(self.seed)


@dataclass(frozen=True)
class BenchSetup:
    """Model and samples of a benchmark; the model has its true size only on a GPU."""

    model: str  # choice of the group `model`
    overrides: tuple[str, ...] = ()
    log_every: int = 1  # steps; a training is timed whenever it logs, for which the host waits

    @cached_property
    def device(self) -> torch.device:
        """Device of the benchmark."""
        return own_device()

    @property
    def is_full_size(self) -> bool:
        """Whether the model has its true size, which needs a GPU."""
        return self.device.type == "cuda"

    @cached_property
    def run_config(self) -> RunConfig:
        """Configuration of the run that is measured, composed as for the command line."""
        fixed = ("model.weights=random", "train=steps500", "train.batch=1", "train.accumulate=1")
        small = () if self.is_full_size else _small_size_overrides(self.model)
        log_every = f"train.log_every={self.log_every}"
        last = (log_every, "train.save_every=100000", "tracker=none")
        return build(compose([f"model={self.model}", *fixed, *small, *self.overrides, *last]))

    @property
    def state_limits(self) -> StateLimits:
        """The limits of hidden states that a run of this kind has."""
        return state_limits(self.run_config.budget, usable_device_bytes(self.device))

    @cached_property
    def source(self) -> Source:
        """The model with random weights."""
        return self.run_config.model.open()

    @property
    def stores_features(self) -> bool:
        """Whether the training reads stored features, and has no vision tower."""
        return self.run_config.train.stores_features

    @cached_property
    def training_source(self) -> Source:
        """The model as it is trained."""
        return trained_source(self.run_config.train, self.source)

    @property
    def training_inputs(self) -> TrainingInputs:
        """Adapter, layers and recipe of the training; the training rows come from `rows`."""
        run_config, adapter = self.run_config, self.run_config.adapter
        assert adapter.trains  # benchmarks only use methods that train
        no_examples = Examples("random", ())
        layers, length = tuple(run_config.model.adapted_layers(self.source)), self.length
        return TrainingInputs(
            adapter, run_config.lora, layers, no_examples, length, run_config.train, run_config.seed
        )

    def rows(self) -> list[RandomRow]:
        """Return one training row for each optimizer step."""
        return self.random_rows(self.run_config.train.steps)

    def random_rows(self, count: int) -> list[RandomRow]:
        """Return so many rows, each with a seed of its own."""
        start = self.length - self.answer
        return [RandomRow(self.length, seed, start) for seed in range(count)]

    @property
    def tiles(self) -> int:
        """Image tiles of one sample."""
        return TILES if self.is_full_size else 2

    @property
    def text(self) -> int:
        """Text tokens of one sample, answer included."""
        return TEXT if self.is_full_size else 16

    @property
    def answer(self) -> int:
        """Answer tokens of one sample, which have labels."""
        return ANSWER if self.is_full_size else 8

    @property
    def length(self) -> int:
        """Tokens of one sample, of image and text."""
        return self.tiles * self._tokens_per_tile + self.text

    @property
    def _tokens_per_tile(self) -> int:
        """Image tokens that the model computes from one tile."""
        vision = self.source.config.vision_config
        side = vision.image_size[0] // vision.patch_size[0]
        return int((side * self.source.config.downsample_ratio) ** 2)

    def batch(self, seed: int, *, stored: bool = False) -> dict[str, Tensor]:
        """Return one random sample as inputs of the model, without labels.

        With `stored` it has features of the tiles in place of their pixels.
        """
        generator, config = torch.Generator().manual_seed(seed), self.source.config
        size = (self._tokens_per_tile, config.get_text_config().hidden_size)
        pixels = (3, *config.vision_config.image_size)
        tiles = torch.randn(self.tiles, *(size if stored else pixels), generator=generator)
        return self._tokens(seed) | {"pixel_values": tiles.to(self.source.dtype)}

    def _tokens(self, seed: int) -> dict[str, Tensor]:
        """Return the tokens of a random sample, and their mask."""
        generator, config = torch.Generator().manual_seed(seed), self.source.config
        image = torch.full((1, self.length - self.text), config.image_token_id)
        text = torch.randint(0, config.image_token_id, (1, self.text), generator=generator)
        ids = torch.cat([image, text], dim=1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def labelled_batch(
        self, seed: int, features: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return one random sample with labels on its answer, and logits for these tokens only.

        `features` are inputs in place of the random ones of the tiles.
        """
        if features is None:
            batch = self.batch(seed, stored=self.stores_features)
        else:
            batch = self._tokens(seed) | features
        labels = batch["input_ids"].clone()
        labels[:, : -self.answer] = -100
        positions = torch.arange(self.length)[-self.answer - 1 :]
        return batch | {"labels": labels[:, positions], "logits_to_keep": positions}


def _small_size_overrides(model: str) -> tuple[str, ...]:
    """Return the overrides that reduce a model to tiny layers."""
    shape = compose([f"model={model}"]).model.shape
    has_vision = "vision_config" in shape
    prefix = "model.shape.text_config" if has_vision else "model.shape"
    text = tuple(f"{prefix}.{size}" for size in SMALL_TEXT)
    # The tokens that begin and end a text lie outside the small vocabulary.
    text_shape = shape.text_config if has_vision else shape
    ends = tuple(
        f"{prefix}.{token}=null"
        for token in ("bos_token_id", "eos_token_id")
        if token in text_shape
    )
    return (*text, *ends, "lora=r4", *(SMALL_VISION if has_vision else ()))


@dataclass(frozen=True)
class RandomSamples:
    """Random calibration samples of a benchmark."""

    setup: BenchSetup
    count: int

    @property
    def key(self) -> list[Any]:
        """JSON value of the samples in cache keys."""
        return [self.setup.model, self.setup.length, self.count]

    @property
    def ids(self) -> list[str]:
        """Names of the samples."""
        return [row.id for row in self.examples]

    @property
    def examples(self) -> list[RandomRow]:
        """The samples as training rows."""
        return self.setup.random_rows(self.count)

    def batches(self, source: Source, device: torch.device | None = None) -> Sequence[Batch]:
        """Return the samples, each as a batch of its own."""
        stored = source.features is not None
        return [self.setup.batch(index, stored=stored) for index in range(self.count)]


def reset_memory(device: torch.device) -> None:
    """Free unused memory and restart the measurement of peak device memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gb(device: torch.device) -> float:
    """Return the peak of allocated device memory in GB (10^9 bytes); nan without a GPU."""
    if device.type != "cuda":
        return float("nan")
    return torch.cuda.max_memory_allocated(device) / 1e9


def reserved_gb(device: torch.device) -> float:
    """Return the peak of reserved device memory in GB (10^9 bytes); nan without a GPU."""
    if device.type != "cuda":
        return float("nan")
    return torch.cuda.max_memory_reserved(device) / 1e9


def synchronized_time(device: torch.device) -> float:
    """Return the clock in seconds after all launched kernels have finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def time_call(work: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds that a call takes, with the kernels that it launches."""
    start = synchronized_time(device)
    work()
    return synchronized_time(device) - start
