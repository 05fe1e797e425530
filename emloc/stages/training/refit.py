"""Fit a low-rank emulator anew, to what the loss of an anchored training depends on.

Anchors take away the errors of an emulator's hidden states. What is left are the errors of its
Jacobians, by which gradients pass. So the factors are fitted to the original's activations on the
calibration rows, with the present adapter on it, weighted by the gradient of the loss at each
layer's outputs. The gradients are the emulator's own, put back onto the original's hidden states.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors.torch import load_file
from torch import Tensor

from emloc.anchors.attached import AttachedOffsets
from emloc.anchors.batches import AnchoredCollator, KeyedRow, take_offsets
from emloc.anchors.record import Original, Stretches
from emloc.anchors.shards import OffsetReader
from emloc.calibration.blockwise import Block, by_block, fill_outside, iterate_blocks
from emloc.calibration.offload import StateLimits
from emloc.calibration.samples import Samples
from emloc.data.reader import encode_all
from emloc.emulators import BuiltEmulator, Ranks
from emloc.emulators.operations import block_operations
from emloc.models.checkpoint.source import Source
from emloc.models.decoder import Decoder
from emloc.precision import Precision
from emloc.runtime.attempts import attempt
from emloc.runtime.progress import tracked
from emloc.runtime.safetensors_file import write_safetensors
from emloc.runtime.stage_cache import Artifact
from emloc.stages.training.anchored_rows import AnchoredRows, unique
from emloc.stages.training.round_trainee import RoundTrainee
from emloc.stages.training.trainee import Trainee
from emloc.tensors.nn.attention import without_cudnn

# Most tokens whose gradients are kept for each layer, and most bytes of those of all layers, for
# which a large model keeps fewer tokens. They are on the disk until the factors are fitted.
TOKENS = 4096
GRADIENT_BYTES = 8 * 2**30


def gradient_bytes(source: Source, ranks: Ranks) -> int:
    """Return the most bytes of disk that the gradients for a fit of some layers take."""
    return gradient_tokens(source, ranks) * _gradient_bytes_of_token(source, ranks)


def gradient_tokens(source: Source, ranks: Ranks) -> int:
    """Return the most tokens whose gradients are kept for a fit of some layers; at least one."""
    return max(1, min(TOKENS, GRADIENT_BYTES // max(1, _gradient_bytes_of_token(source, ranks))))


def _gradient_bytes_of_token(source: Source, ranks: Ranks) -> int:
    """Return the bytes of the gradients of a token at the outputs of some layers of the decoder."""
    prefix = Decoder(source).prefix
    outputs = sum(source.linears[name][0] for name in ranks if name.startswith(prefix))
    return outputs * source.dtype.itemsize


@runtime_checkable
class Refittable(Protocol):
    """An emulator that can be fitted anew without a change of its shapes."""

    def ranks(self, folder: Path) -> Ranks:
        """Return the ranks of the emulator in `folder`."""

    def refit(
        self,
        folder: Path,
        source: Source,
        blocks: Any,
        ranks: Ranks,
        gradients: Callable[[str], Mapping[str, Tensor]],
        precision: Precision | None,
    ) -> None:
        """Write the emulator's files into `folder`; see `Svd.refit`."""


@dataclass(frozen=True)
class Refit:
    """The rows that an emulator is fitted to, and the ranks of its layers."""

    rows: AnchoredRows
    samples: Samples
    ranks: Ranks

    def run(
        self,
        folder: Path,
        trainee: RoundTrainee,
        original: Callable[[], Original],
        *,
        limits: StateLimits,
    ) -> float:
        """Write the emulator that is fitted to the present adapter into `folder`.

        Args:
            folder: of the emulator's artifact.
            trainee: the present emulator with the adapter, unsharded. It is closed before factors
                are fitted, since both need memory.
            original: returns the original with the adapter as it is carried, each time anew.
            limits: memory for hidden states.

        Returns:
            The arithmetic, in forwards of the original over one row.
        """
        work = folder.with_name(f"{folder.name}.work")
        work.mkdir(parents=True, exist_ok=True)
        backward = trainee.open().work(len(self.samples.examples))["row_forwards"]
        with attempt(work) as spent:
            self._run(folder, work, trainee, original, limits)
        shutil.rmtree(work)
        return backward + spent.operations / block_operations(self.rows.source)

    def _run(
        self,
        folder: Path,
        work: Path,
        round_trainee: RoundTrainee,
        original: Callable[[], Original],
        limits: StateLimits,
    ) -> None:
        trainee, device = round_trainee.open(), round_trainee.device
        rows, built = self.encoded(), trainee.built_emulator
        places, stored_as = self.rows.places, self.rows.anchor.stored_as
        self.rows.record(
            work / "offsets",
            original(),
            Stretches(trainee.inner, places, stored_as, trainee.context, has_head_of_original=True),
            rows,
            [],
            device=device,
            limits=limits,
        )
        self._write_gradients(work, trainee, rows)
        del trainee
        round_trainee.close()
        emulator = built.emulator
        assert isinstance(emulator, Refittable)
        with without_cudnn():
            emulator.refit(
                folder,
                self.rows.source,
                self._blocks(original(), device, limits, work),
                self.ranks,
                lambda block: _read_gradients(work, block),
                built.precision,
            )

    def encoded(self) -> list[KeyedRow]:
        """Return the calibration samples as training rows."""
        reader = self.rows.source.reader()
        encoded = encode_all(reader, self.samples.examples, self.samples.max_length)
        return unique(KeyedRow(row, row.key) for row in encoded)

    def _blocks(
        self, original: Original, device: torch.device, limits: StateLimits, folder: Path
    ) -> Iterator[Block]:
        """Yield the blocks of the original with compressed layers, on the calibration rows."""
        model, blocks = original.model, list(by_block(self.ranks))
        if original.weights is not None:
            fill_outside(model, original.weights, blocks, device)
        model.eval()
        batches = self.samples.batches(self.rows.source, device)
        passes = iterate_blocks(
            *(model, batches, blocks, device, original.weights),
            limits=limits,
            folder=folder,
        )
        return iter(tracked(passes, "refit", len(blocks), "block"))

    def _write_gradients(self, folder: Path, trainee: Trainee, rows: Sequence[KeyedRow]) -> None:
        """Write the gradients at the outputs of all compressed layers, batch by batch."""
        places, stored_as = self.rows.places, self.rows.anchor.stored_as
        inputs, source = trainee.training_inputs, trainee.built_emulator.source
        collator = AnchoredCollator(
            *(self.rows.collate, OffsetReader([folder / "offsets"]), places), pinned=False
        )
        hooks = AttachedOffsets(places, stored_as)
        size = inputs.recipe.batch
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        share = min(1.0, gradient_tokens(source, self.ranks) / sum(row.length for row in rows))
        loss = trainee.loss or source.objective.loss
        trainee.model.train()
        with (
            hooks.attached(trainee.inner),
            without_cudnn(),
            inputs.adapter.training(trainee.model, mixed=trainee.mixed),
        ):
            for index, some in enumerate(tracked(batches, "gradients", len(batches), "batch")):
                batch = collator(some)
                hooks.offsets = take_offsets(batch, trainee.device)
                mask = _sample(batch["attention_mask"].bool(), share, index)
                batch = {n: v.to(trainee.device) for n, v in batch.items()}
                with _gradients_at(trainee.inner, self.ranks, mask) as gradients, trainee.context():
                    count = source.objective.items(batch)
                    # A sum over the items, so that batches of all sizes weigh their items alike.
                    torch.autograd.backward(loss(trainee.model, batch, count) * count)
                trainee.model.zero_grad(set_to_none=True)
                for block, layers in by_block(gradients).items():
                    path = folder / f"{block}-{index:05d}.safetensors"
                    tensors = {name: gradients[name] for name in layers}
                    write_safetensors(path, tensors, {}, durable=False)
        collator.close()


@contextmanager
def _gradients_at(
    model: torch.nn.Module, layers: Sequence[str] | Ranks, mask: Tensor
) -> Iterator[dict[str, Tensor]]:
    """Yield a mapping that a backward pass fills: layer -> gradients (N, m) at chosen tokens.

    `mask` (B, L) chooses the tokens. Layers without a gradient, such as those below the first
    adapter, and layers that process no tokens are left out.
    """
    gradients: dict[str, Tensor] = {}
    handles = []

    def keep(name: str, gradient: Tensor) -> None:
        if gradient.shape[:2] == mask.shape:
            gradients[name] = gradient[mask.to(gradient.device)].detach().to("cpu")

    for name in layers:

        def watch(_: Any, __: Any, output: Tensor, name: str = name) -> None:
            if output.requires_grad:
                output.register_hook(lambda gradient: keep(name, gradient))  # type: ignore[no-untyped-call]

        handles.append(model.get_submodule(name).register_forward_hook(watch))
    try:
        yield gradients
    finally:
        for handle in handles:
            handle.remove()


def _sample(mask: Tensor, share: float, seed: int) -> Tensor:
    """Return a mask (B, L) of a share of the real tokens, at least one, chosen at random."""
    positions = mask.nonzero()
    count = max(1, math.ceil(share * len(positions)))
    order = torch.randperm(len(positions), generator=torch.Generator().manual_seed(seed))
    selection = torch.zeros_like(mask)
    selection[tuple(positions[order[:count]].T)] = True
    return selection


def _read_gradients(folder: Path, block: str) -> dict[str, Tensor]:
    """Return layer -> gradients (N, m) of one block over all batches."""
    parts = [load_file(path) for path in sorted(folder.glob(f"{block}-[0-9]*.safetensors"))]
    names = {name for part in parts for name in part}
    return {name: torch.cat([part[name] for part in parts if name in part]) for name in names}


def refit_of(rows: AnchoredRows, samples: Samples | None, built: BuiltEmulator) -> Refit | None:
    """Return how to fit an emulator anew; None for one without factors or without samples."""
    if samples is None or not isinstance(built.emulator, Refittable):
        return None
    ranks = built.emulator.ranks(built.artifact.folder)
    present = rows.source.emulated(ranks)
    return Refit(rows, samples, {layer: ranks[layer] for layer in present})


def with_folder(built: BuiltEmulator, folder: Path) -> BuiltEmulator:
    """Return the emulator whose files are in another folder."""
    return replace(built, artifact=Artifact(built.artifact.stage, built.artifact.key, folder))
