"""Anchored emulators for tests: in float64, with a reference adapter that changes the outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from packed import precision_of
from tiny import save_checkpoint
from torch import Tensor, nn

from emloc.adapters import Adapter
from emloc.adapters.lora import Lora
from emloc.adapters.streamed import load_unread
from emloc.adapters.training_inputs import TrainingInputs
from emloc.anchors import Anchor
from emloc.anchors.attached import AttachedOffsets
from emloc.anchors.batches import AnchoredCollator, KeyedRow, take_offsets
from emloc.anchors.formats import Floats, OffsetFormat
from emloc.anchors.places import Place
from emloc.anchors.record import Original, Rows, Stretches, record
from emloc.anchors.shards import OffsetReader
from emloc.calibration.blockwise import by_block
from emloc.calibration.offload import StateLimits
from emloc.calibration.samples import Samples
from emloc.config.settings import Compression, LoraSettings, TrainSettings
from emloc.data.collate import IGNORE, collate
from emloc.data.examples import Example, Examples
from emloc.data.prompts import EncodedExample
from emloc.emulators import BuildInputs, BuiltEmulator, Emulator
from emloc.emulators.full import block_linears
from emloc.emulators.layer_drop import block_stack
from emloc.models.checkpoint.source import Source
from emloc.models.objectives.tokens import Tokens
from emloc.recovery import Recovery, RecoveryInputs
from emloc.recovery.none import NoRecovery
from emloc.runtime.stage_cache import Artifact
from emloc.stages.training.anchored_rows import anchored_rows
from emloc.stages.training.callbacks import Report
from emloc.stages.training.kept_trainee import OpenedTrainee
from emloc.stages.training.refit import refit_of
from emloc.stages.training.rounds import Rounds, rounds_of
from emloc.stages.training.trainee import open_trainee

CPU = torch.device("cpu")
FLOAT64 = Floats(torch.float64)
# Prompt and answer tokens of each row: batches of unequal lengths.
LENGTHS = ((9, 4), (14, 6), (5, 2), (11, 3), (20, 7), (8, 1))


def rows(count: int = len(LENGTHS), seed: int = 0) -> list[KeyedRow]:
    """Return encoded rows of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    encoded = [
        EncodedExample(
            f"row/{index}",
            torch.randint(5, 240, (prompt + answer,), generator=generator).tolist(),
            prompt,
        )
        for index, (prompt, answer) in enumerate(LENGTHS[:count])
    ]
    return [KeyedRow(row, row.key) for row in encoded]


def collate_rows(some: list[EncodedExample]) -> dict[str, Tensor]:
    """Collate rows with padding on the left; 0 is the padding token of the tiny tokenizer."""
    return collate(some, 0)


def collate_right(some: list[EncodedExample]) -> dict[str, Tensor]:
    """Collate rows with padding on the right, and with labels at all positions."""
    ids = torch.zeros(len(some), max(row.length for row in some), dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
    for index, row in enumerate(some):
        ids[index, : row.length] = torch.tensor(row.input_ids)
        mask[index, : row.length] = 1
        labels[index, row.answer_start : row.length] = ids[index, row.answer_start : row.length]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def samples() -> Samples:
    """Return calibration samples of text."""
    texts = [Example(f"sample/{i}", f"{i} and {i + 3} are", str(2 * i + 3)) for i in range(8)]
    return Samples(Examples("samples", tuple(texts)), None)


def build_emulator(
    folder: Path, source: Source, emulator: Emulator, bits: int, ratio: float = 0.5
) -> BuiltEmulator:
    """Build an emulator of all linears in blocks."""
    layers = {name: source.linears[name] for name in block_linears(source)}
    plan = emulator.plan(source, layers, Compression(ratio=ratio, of="linears", bits=bits))
    precision = precision_of(bits)
    emulator.build(folder, source, BuildInputs(plan, None, samples(), precision), device=CPU)
    return BuiltEmulator(emulator, Artifact("emulate", "0", folder), source, precision)


def reference_adapter(
    folder: Path, built: BuiltEmulator, adapter: Adapter, recovery: Recovery
) -> nn.Module:
    """Return the emulator with an adapter that is no zero, saved in `folder` as the original's."""
    targets = built.targets([*built.source.linears])
    layers = [name for name in targets if name in {*block_linears(built.source)}]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        tuned = adapter.attach(built.open(CPU), LoraSettings(rank=2, alpha=2, dropout=0), layers)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.data.copy_(0.05 * noise)
    adapter.save(tuned, folder / "trained" / "adapter", "tiny")
    recovery.recover(
        folder / "carried",
        RecoveryInputs(
            trained=Artifact("train", "0", folder / "trained"),
            built_emulator=built,
            samples=None,
            training_inputs=None,
            device=CPU,
        ),
    )
    return tuned


@dataclass
class Anchored:
    """An original and its emulator with the same adapter, and a folder of recorded offsets."""

    folder: Path
    original: nn.Module  # with the adapter, in memory
    emulator: nn.Module
    places: list[Place]
    stored_as: OffsetFormat
    collate: Callable[[list[Any]], dict[str, Any]] = collate_rows

    def batch(self, some: list[KeyedRow]) -> dict[str, Tensor]:
        """Return a batch of rows without offsets."""
        return self.collate([keyed.row for keyed in some])

    @contextmanager
    def put_back(self, some: list[KeyedRow]):
        """Put the emulator back onto the original's hidden states of these rows."""
        hooks = AttachedOffsets(self.places, self.stored_as)
        collator = AnchoredCollator(
            self.collate, OffsetReader([self.folder]), self.places, pinned=False
        )
        with hooks.attached(self.emulator):
            hooks.offsets = take_offsets(collator(some), CPU)
            yield
        collator.close()


def states_at(model: nn.Module, places: list[Place], batch: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the hidden states (N, d) at the places, of the tokens that have offsets."""
    states: list[Tensor] = []
    masks = [place.tokens(batch) for place in places]
    handles = []
    for place, mask in zip(places, masks, strict=True):

        def keep(hidden: Tensor, mask: Tensor = mask) -> Tensor:
            states.append(hidden[mask])
            return hidden

        handles.append(place.attach(model, keep))
    model(**batch)
    for handle in handles:
        handle.remove()
    return states


def record_anchors(
    folder: Path,
    built: BuiltEmulator,
    adapter: Adapter,
    recovery: Recovery,
    places: list[Place],
    *,
    stored_as: OffsetFormat = FLOAT64,
    batch_tokens: int = 40,
) -> Anchored:
    """Record the offsets of `rows()` with a reference adapter, and return both models."""
    source = built.source
    emulator = reference_adapter(folder, built, adapter, recovery)
    inner = adapter.base(emulator)
    record(
        folder / "offsets",
        Original(*load_unread(source, adapter, folder / "carried" / "adapter")),
        Stretches(inner, places, stored_as, has_head_of_original=True),
        Rows(rows(), [], collate_rows, Tokens(), batch_tokens),
        list(by_block(block_linears(source))),
        block_stack(source),
        device=CPU,
    )
    original = adapter.load(source.load(CPU), folder / "carried" / "adapter")
    return Anchored(folder / "offsets", adapter.base(original), inner, places, stored_as)


def tiny_source(made_once: Callable[..., Path], blocks: int, *, tied: bool = False) -> Source:
    """Return a tiny model with so many blocks, in float32; its head may be the embedding."""
    make = partial(save_checkpoint, num_hidden_layers=blocks, tie_word_embeddings=tied)
    name = f"{'tied' if tied else 'blocks'}_{blocks}"
    return Source(made_once(name, make), "tiny", "0", torch.float32)


def in_float64(source: Source) -> Source:
    """Return the same model in float64."""
    return replace(source, dtype=torch.float64)


LORA = LoraSettings(rank=2, alpha=2, dropout=0)
RECIPE = TrainSettings(
    steps=6,
    batch=2,
    accumulate=1,
    learning_rate=0.02,
    schedule="cosine",
    warmup=0.0,
    weight_decay=0.0,
    clip=1.0,
    checkpointing=True,
    host_activations=False,
    lean=True,
    log_every=1,
    save_every=1,
)


def sums(count: int = 20) -> Examples:
    """Return training rows, all different and of several lengths."""
    texts = [
        Example(f"sum/{i}", f"{10 ** (i % 4)} + {i} is", f" {10 ** (i % 4) + i}")
        for i in range(count)
    ]
    return Examples("sums", tuple(texts))


def training_inputs(
    built: BuiltEmulator,
    *,
    adapter: Adapter | None = None,
    examples: Examples | None = None,
    lora: LoraSettings = LORA,
    seed: int = 0,
    **recipe: Any,
) -> TrainingInputs:
    """Return the inputs of a training of a few steps."""
    layers = [name for name in block_linears(built.source) if "mlp" in name or "q_proj" in name]
    return TrainingInputs(
        adapter or Lora(),
        lora,
        tuple(layers),
        examples or sums(),
        None,
        replace(RECIPE, **recipe),
        seed,
    )


def rounds(
    folder: Path,
    built: BuiltEmulator,
    anchor: Anchor,
    *,
    report: Report = lambda _, __: None,
    calibration: Samples | None = None,
    opened: OpenedTrainee | None = None,
    **inputs: Any,
) -> Rounds:
    """Return an anchored training in `folder`, which may hold an interrupted one.

    With `calibration` the emulator is fitted to these samples at each round but the first. `opened`
    is the trainee, if it is opened already.
    """
    settings = training_inputs(built, **inputs)
    folder.mkdir(exist_ok=True)
    rows = anchored_rows(anchor, built.source, settings, disk_gib=1.0)
    return rounds_of(
        folder,
        open_trainee(built, settings, CPU) if opened is None else opened.trainee,
        rows,
        NoRecovery(),
        None,
        StateLimits(host=2**30),
        report,
        refit_of(rows, calibration, built),
        None if opened is None else opened.passes,
    )
