"""A model as one of the methods trains through it: which layers are held how, and how large."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from emloc.adapters.fused import fuse
from emloc.adapters.lora import Lora
from emloc.calibration.calibrate import Layers
from emloc.config.settings import LoraSettings, TrainSettings
from emloc.cost.plan.blocks import DecoderBlocks
from emloc.cost.plan.trace import TraceResult, trace
from emloc.emulators import Ranks
from emloc.emulators.full import IN_A_BLOCK
from emloc.emulators.size import bytes_of, factor_shapes
from emloc.models.checkpoint.source import Source
from emloc.models.decoder import decoder_of
from emloc.precision import Precision
from emloc.tensors.lean.activations import offload_layer_inputs
from emloc.tensors.lean.layers import aligned_height
from emloc.tensors.lean.loss import CHUNK_BYTES, AnswerLoss
from emloc.tensors.lean.model import recompute_layers
from emloc.tensors.lean.modules import fuse_modules
from emloc.tensors.nn.factorized import Factorized

# Blocks that are run to see what the others will hold: the step from one to the next is the same.
SEEN = 2


@dataclass(frozen=True)
class StepShape:
    """One optimizer step of training on one device."""

    length: int  # tokens of one sample
    batch: int  # samples of one forward pass
    answer: int  # tokens of one sample that are learnt
    checkpointing: bool
    host_activations: bool
    accumulate: int = 1  # forward passes

    @classmethod
    def of(cls, recipe: TrainSettings, length: int, answer: int) -> StepShape:
        """A step of the recipe, on samples of this length of which so much is learnt."""
        return cls(
            length,
            recipe.batch,
            answer,
            recipe.checkpointing,
            recipe.host_activations,
            recipe.accumulate,
        )


@dataclass(frozen=True)
class TrainingLayout:
    """How the layers of a model are held while an adapter is trained."""

    blocks: DecoderBlocks
    adapted: Layers
    compressed: Layers
    lora: LoraSettings
    ranks: Ranks  # of the compressed layers; empty: every layer is whole
    precision: Precision | None  # of what is compressed, or of all blocks where nothing is

    @property
    def source(self) -> Source:
        """The model."""
        return self.blocks.source

    @property
    def weights(self) -> int:
        """Bytes of all that is frozen and on the device."""
        size = self.source.dtype.itemsize
        total = 0
        for name, count in self.source.sizes.items():
            layer = name.removesuffix(".weight")
            if layer in self.source.linears:
                total += self._held(layer)
            elif name != self.blocks.decoder.lone_embedding:
                total += count * size
        return total

    @property
    def embedding(self) -> int:
        """Bytes of a token embedding that leaves the device before the first step."""
        lone = self.blocks.decoder.lone_embedding
        return self.source.sizes[lone] * self.source.dtype.itemsize if lone else 0

    @property
    def uncompressed(self) -> int:
        """Bytes on the device of what no ratio makes smaller."""
        own = {f"{layer}.weight" for layer in self.compressed} | {
            self.blocks.decoder.lone_embedding
        }
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
        """Bytes written in one pass to form what is packed."""
        packed = [layer for layer in self.adapted if self._packed(layer)]
        return sum(self.multiplied(layer) for layer in packed) * self.source.dtype.itemsize

    def logits(self, work: StepShape) -> int:
        """Bytes of the logits that exist at one time, in float32 and in the model's dtype."""
        vocabulary, size = self.blocks.decoder.vocabulary, self.source.dtype.itemsize
        rows = min(work.batch * work.answer, max(1, CHUNK_BYTES // (4 * vocabulary)))
        return rows * vocabulary * (4 + (size if size < 4 else 0))

    def _packed(self, layer: str) -> bool:
        """Whether it is packed: its factors, or with no factors anywhere itself."""
        if self.precision is None:
            return False
        return layer in self.ranks if self.ranks else bool(re.fullmatch(IN_A_BLOCK, layer))

    def _held(self, layer: str) -> int:
        shape, k = self.source.linears[layer], self.ranks.get(layer)
        matrices = [shape] if k is None else factor_shapes(shape, k)
        precision = self.precision if self._packed(layer) else None
        return bytes_of(matrices, precision, self.source.dtype)

    @property
    def parameters(self) -> int:
        """Trainable parameters, which are in float32."""
        return sum(self.lora.rank * (m + n) for m, n in self.adapted.values())

    @property
    def copies(self) -> int:
        """Bytes of the adapter's copies beside the layers it rides on."""
        rank, copies = self.lora.rank, 0
        for layer, (rows, columns) in self.adapted.items():
            extra = rank
            if layer in self.ranks and self.precision is None:
                extra = aligned_height(self.ranks[layer] + rank) - self.ranks[layer]
            copies += extra * (rows + columns)
        return copies * self.source.dtype.itemsize

    @property
    def scratch(self) -> int:
        """Bytes in which packed matrices are formed to be multiplied.

        Adapted layers share room for the largest of their first and of their second matrices; a
        layer of the decoder without an adapter forms one matrix at a time beside it.
        """
        rooms, aside = (0, 0), 0
        for layer, (rows, columns) in self.source.linears.items():
            if not self._packed(layer) or not layer.startswith(self.blocks.decoder.prefix):
                continue
            k = self.ranks.get(layer)
            if layer not in self.adapted:
                aside = max(aside, rows * columns if k is None else k * max(rows, columns))
                continue
            height = rows if k is None else aligned_height(k + self.lora.rank)
            second = 0 if k is None else height * rows
            rooms = max(rooms[0], height * columns), max(rooms[1], second)
        return (sum(rooms) + aside) * self.source.dtype.itemsize

    def traced(self, work: StepShape) -> TraceResult:
        """What one pass holds beside what is there all the time, and its operations.

        A few blocks are run; each further one adds as much as the last of them did.
        """
        one, two = (self.run(work, depth) for depth in (SEEN, SEEN + 1))
        more = self.blocks.count - SEEN
        return TraceResult(
            one.peak + more * (two.peak - one.peak),
            one.operations + more * (two.operations - one.operations),
        )

    def run(self, work: StepShape, depth: int) -> TraceResult:
        """The same of a model with the first `depth` decoder blocks alone."""
        model = self._model(depth)
        decoder, head = decoder_of(model), model.get_output_embeddings().weight
        wide = head.shape[1]
        labels = torch.empty(work.batch * work.answer, dtype=torch.long, device="meta")
        count = torch.empty((), device="meta")

        def step() -> None:
            # Named here, what enters the first block would be held to the end.
            hidden = decoder(
                inputs_embeds=head.new_empty(work.batch, work.length, wide), use_cache=False
            ).last_hidden_state
            learnt = hidden[:, -work.answer :].reshape(-1, wide)
            loss: Tensor = AnswerLoss.apply(learnt, head, labels, count)  # type: ignore[no-untyped-call]
            loss.backward()  # type: ignore[no-untyped-call]

        there = {name for name, _ in model.named_modules()}
        tuned = Lora().attach(model, self.lora, [one for one in self.adapted if one in there])
        fuse(tuned)
        fuse_modules(model, self.source.dtype)
        model.train()
        if work.checkpointing:
            recompute_layers(model)
        if work.host_activations:
            offload_layer_inputs(model)
        if work.accumulate > 1:  # the sum of the passes before
            for one in tuned.parameters():
                one.grad = torch.empty_like(one) if one.requires_grad else None
        return trace(step)

    def _model(self, depth: int) -> PreTrainedModel:
        model = self.blocks.first(depth)
        nowhere = partial(torch.empty, dtype=self.source.dtype, device="meta")
        for name, module in list(model.named_modules()):
            if name in self.ranks:
                u = nowhere(module.out_features, self.ranks[name])
                v = nowhere(self.ranks[name], module.in_features)
                model.set_submodule(name, Factorized(u, v, module.bias))
        return model
