"""A model as one of the methods trains through it: which layers are held how, and how large."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from emloc.adapters.fused import fuse
from emloc.adapters.lora import Lora
from emloc.calibrate import Layers
from emloc.emulators.full import IN_A_BLOCK
from emloc.emulators.size import ranks_at
from emloc.lean.activations import keep_on_host
from emloc.lean.layers import aligned
from emloc.lean.loss import CHUNK_BYTES, AnswerLoss
from emloc.lean.model import recompute_layers
from emloc.lean.modules import fewer_operations
from emloc.nn.factorized import Factorized
from emloc.nn.nf4 import nf4_bytes
from emloc.plan.trace import ATTENTION, Traced, trace
from emloc.settings import LoraSettings
from emloc.source import Source

# Blocks that are run to see what the others will hold: the step from one to the next is the same.
SEEN = 2
# float32: the parameter itself and two moments of AdamW.
PER_PARAMETER = 12


@dataclass(frozen=True)
class Work:
    """One step of training on one device."""

    length: int  # tokens of one sample
    batch: int  # samples of one forward pass
    answer: int  # tokens of one sample that are learnt
    checkpointing: bool
    host_activations: bool


@dataclass(frozen=True)
class Scheme:
    """How the layers of a model are held while an adapter is trained."""

    source: Source
    targets: str  # of the adapter: regular expression on layer names
    adapted: Layers
    compressed: Layers
    lora: LoraSettings
    ratio: float | None  # share kept of the compressed layers; None: every layer is whole
    bits: int  # 16 or 4, of what is compressed, or of all blocks where nothing is
    multiple: int  # of the ranks

    @cached_property
    def ranks(self) -> Mapping[str, int]:
        """Layer -> rank of its factors.

        Raises:
            ConfigError: the ratio leaves a layer without rank.
        """
        return {} if self.ratio is None else ranks_at(self.ratio, self.compressed, self.multiple)

    @property
    def weights(self) -> int:
        """Bytes of all that is frozen and on the device."""
        size = self.source.dtype.itemsize
        total = 0
        for name, count in self.source.sizes.items():
            layer = name.removesuffix(".weight")
            if layer in self.source.linears:
                total += self._held(layer)
            elif name != self.source.lone_embedding:  # which stays in host memory
                total += count * size
        return total

    @property
    def uncompressed(self) -> int:
        """Bytes on the device of what no ratio makes smaller."""
        own = {f"{layer}.weight" for layer in self.compressed} | {self.source.lone_embedding}
        sizes = self.source.sizes.items()
        return sum(count for name, count in sizes if name not in own) * self.source.dtype.itemsize

    @property
    def factors(self) -> int:
        """Bytes of all factors."""
        return sum(self._held(layer) for layer in self.ranks)

    def multiplied(self, layer: str) -> int:
        """Numbers one token is multiplied by in this layer."""
        rows, columns = self.source.linears[layer]
        return self.ranks[layer] * (rows + columns) if layer in self.ranks else rows * columns

    @property
    def formed(self) -> int:
        """Bytes written in one pass to form what is held in four bits."""
        if self.bits != 4:
            return 0
        return sum(self.multiplied(layer) for layer in self.adapted) * self.source.dtype.itemsize

    def logits(self, work: Work) -> int:
        """Bytes of the logits that exist at one time, in float32 and in the model's dtype."""
        vocabulary = self.source.vocabulary
        rows = min(work.batch * work.answer, max(1, CHUNK_BYTES // (4 * vocabulary)))
        return rows * vocabulary * (4 + self.source.dtype.itemsize)

    def _held(self, layer: str) -> int:
        size = self.source.dtype.itemsize
        rows, columns = self.source.linears[layer]
        if layer in self.ranks:
            k = self.ranks[layer]
            if self.bits == 4:
                return nf4_bytes(k, rows) + nf4_bytes(k, columns)
            return k * (rows + columns) * size
        if self._packed_whole(layer):
            return nf4_bytes(rows, columns)
        return rows * columns * size

    def _packed_whole(self, layer: str) -> bool:
        return self.ratio is None and self.bits == 4 and bool(re.fullmatch(IN_A_BLOCK, layer))

    @property
    def adapter(self) -> int:
        """Bytes of the adapter with its optimizer, and of its copies beside the layers."""
        rank, size = self.lora.rank, self.source.dtype.itemsize
        copies = 0
        for layer, (rows, columns) in self.adapted.items():
            extra = rank
            if layer in self.ranks and self.bits == 16:
                extra = aligned(self.ranks[layer] + rank) - self.ranks[layer]
            copies += extra * (rows + columns) * size
        return copies + self.parameters * PER_PARAMETER

    @property
    def parameters(self) -> int:
        """Trainable parameters."""
        return sum(self.lora.rank * (m + n) for m, n in self.adapted.values())

    @property
    def scratch(self) -> int:
        """Bytes in which four-bit matrices are formed to be multiplied."""
        if self.bits != 4:
            return 0
        size = self.source.dtype.itemsize
        if self.ratio is None:
            return max(rows * columns for rows, columns in self.adapted.values()) * size
        tall = [
            (aligned(self.ranks[layer] + self.lora.rank), *shape)
            for layer, shape in self.adapted.items()
            if layer in self.ranks
        ]
        sides = [max((t * side for t, *sides in tall for side in (sides[i],))) for i in (0, 1)]
        return sum(sides) * size

    def traced(self, work: Work) -> Traced:
        """What one step holds beside weights, optimizer state and scratch, and its operations.

        A few blocks are run; each further one adds as much as the last of them did.
        """
        one, two = (self._run(work, depth) for depth in (SEEN, SEEN + 1))
        blocks = len(_layers(self.source.skeleton()))
        more = blocks - SEEN
        return Traced(
            one.peak + more * (two.peak - one.peak),
            one.operations + more * (two.operations - one.operations),
        )

    def _run(self, work: Work, depth: int) -> Traced:
        model = self._on_meta(depth)
        decoder, head = model.get_decoder(), model.get_output_embeddings().weight
        wide = head.shape[1]
        inputs = head.new_empty(work.batch, work.length, wide)
        labels = torch.empty(work.batch * work.answer, dtype=torch.long, device="meta")
        count = torch.empty((), device="meta")

        def step() -> None:
            hidden = decoder(inputs_embeds=inputs, use_cache=False).last_hidden_state
            learnt = hidden[:, -work.answer :].reshape(-1, wide)
            loss: Tensor = AnswerLoss.apply(learnt, head, labels, count)  # type: ignore[no-untyped-call]
            loss.backward()  # type: ignore[no-untyped-call]

        tuned = Lora().attach(model, self.lora, self.targets)
        fuse(tuned)
        fewer_operations(model, self.source.dtype)
        model.train()
        if work.checkpointing:
            recompute_layers(model)
        if work.host_activations:
            keep_on_host(model)
        return trace(step)

    def _on_meta(self, depth: int) -> PreTrainedModel:
        """The model with `depth` decoder blocks and without any numbers."""
        model = self.source.skeleton()
        model.set_attn_implementation(ATTENTION)
        del _layers(model)[depth:]
        for name, module in list(model.named_modules()):
            if name in self.ranks:
                u = torch.empty(module.out_features, self.ranks[name], dtype=self.source.dtype)
                v = torch.empty(self.ranks[name], module.in_features, dtype=self.source.dtype)
                model.set_submodule(name, Factorized(u.to("meta"), v.to("meta"), module.bias))
        return model.to("meta").requires_grad_(False)


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's blocks."""
    return next(
        module for module in model.get_decoder().modules() if isinstance(module, nn.ModuleList)
    )
