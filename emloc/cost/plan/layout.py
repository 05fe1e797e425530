"""Sizes of a model and its adapter as a method trains them, and a trace of one training pass."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from emloc.adapters.fused import fuse
from emloc.adapters.lora import Lora
from emloc.adapters.shared_input import names_by_input
from emloc.calibration.calibrate import Layers
from emloc.config.settings import LoraSettings, TrainSettings
from emloc.cost.plan.blocks import DecoderBlocks
from emloc.cost.plan.trace import TraceResult, trace
from emloc.emulators import Ranks
from emloc.emulators.size import bytes_of, factor_shapes
from emloc.models.block_names import IN_A_BLOCK
from emloc.models.checkpoint.source import Source
from emloc.models.decoder import decoder_of
from emloc.precision import Precision
from emloc.tensors.lean.activations import offload_layer_inputs
from emloc.tensors.lean.layers import aligned_height
from emloc.tensors.lean.loss import CHUNK_BYTES, AnswerLoss
from emloc.tensors.lean.model import recompute_layers
from emloc.tensors.lean.modules import fuse_modules
from emloc.tensors.nn.factorized import Factorized

# Depth of the shallower of two traced models. Each further block adds the same memory.
TRACED_BLOCKS = 2


@dataclass(frozen=True)
class StepShape:
    """Shape of one optimizer step on one device: lengths, batch, passes and memory settings."""

    length: int  # tokens of one row
    batch: int  # rows of one forward pass
    answer: int  # answer tokens of one row
    checkpointing: bool
    host_activations: bool
    accumulate: int = 1  # forward passes of one step
    offsets: int = 0  # bytes of the anchors' offsets of one forward pass

    @classmethod
    def of(cls, recipe: TrainSettings, length: int, answer: int) -> StepShape:
        """Return the shape of a step of the recipe, for rows with `length` and `answer` tokens."""
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
    """Layers of a model in training: which of them are adapted, factorised and packed."""

    blocks: DecoderBlocks
    adapted: Layers  # layers with a LoRA
    compressed: Layers  # layers that the emulator may compress
    lora: LoraSettings
    ranks: Ranks  # rank of each factorised layer; empty: no layer is factorised
    precision: (
        Precision | None
    )  # packed format of factorised layers; without ranks, of all layers in blocks

    @property
    def source(self) -> Source:
        """The model whose training is planned."""
        return self.blocks.source

    @property
    def weights(self) -> int:
        """Bytes of all frozen weights on the device."""
        size = self.source.dtype.itemsize
        total = 0
        for name, count in self.source.sizes.items():
            layer = name.removesuffix(".weight")
            if layer in self.source.linears:
                total += self._layer_bytes(layer)
            elif name != self.blocks.decoder.untied_embedding:
                total += count * size
        return total

    @property
    def embedding(self) -> int:
        """Bytes of a token embedding that moves to host memory before the first step, else 0."""
        lone = self.blocks.decoder.untied_embedding
        return self.source.sizes[lone] * self.source.dtype.itemsize if lone else 0

    @property
    def uncompressed(self) -> int:
        """Bytes of the weights on the device that are not compressed at any ratio."""
        excluded = {f"{layer}.weight" for layer in self.compressed} | {
            self.blocks.decoder.untied_embedding
        }
        sizes = self.source.sizes.items()
        return (
            sum(count for name, count in sizes if name not in excluded) * self.source.dtype.itemsize
        )

    @property
    def factors(self) -> int:
        """Bytes of the factors of all factorised layers."""
        return sum(self._layer_bytes(layer) for layer in self.ranks)

    def multiplications(self, layer: str) -> int:
        """Return the number of multiplications of one token in a layer: the layer's parameters."""
        rows, columns = self.source.linears[layer]
        return self.ranks[layer] * (rows + columns) if layer in self.ranks else rows * columns

    @property
    def dequantised_bytes(self) -> int:
        """Bytes that one pass writes to dequantise the packed layers."""
        packed = [layer for layer in self.adapted if self._is_packed(layer)]
        return sum(self.multiplications(layer) for layer in packed) * self.source.dtype.itemsize

    def logits(self, step_shape: StepShape) -> int:
        """Return the bytes of one chunk of logits, in float32 and in the model's dtype."""
        vocabulary, size = self.blocks.decoder.vocabulary, self.source.dtype.itemsize
        rows = min(step_shape.batch * step_shape.answer, max(1, CHUNK_BYTES // (4 * vocabulary)))
        return rows * vocabulary * (4 + (size if size < 4 else 0))

    def _is_packed(self, layer: str) -> bool:
        """Return whether a layer is packed.

        Factorised layers are packed if there are any, or else all layers in blocks.
        """
        if self.precision is None:
            return False
        return layer in self.ranks if self.ranks else bool(re.fullmatch(IN_A_BLOCK, layer))

    def _layer_bytes(self, layer: str) -> int:
        """Return the bytes of a layer's weight, as a matrix or as factors, packed or not."""
        shape, rank = self.source.linears[layer], self.ranks.get(layer)
        matrices = [shape] if rank is None else factor_shapes(shape, rank)
        precision = self.precision if self._is_packed(layer) else None
        return bytes_of(matrices, precision, self.source.dtype)

    @property
    def parameters(self) -> int:
        """Number of trainable parameters, which are in float32."""
        return sum(self.lora.rank * (m + n) for m, n in self.adapted.values())

    @property
    def copies(self) -> int:
        """Bytes of the adapter's copies in the model's dtype, which the fused layers use."""
        rank, copies = self.lora.rank, 0
        for layer, (rows, columns) in self.adapted.items():
            extra = rank
            if layer in self.ranks and self.precision is None:
                extra = aligned_height(self.ranks[layer] + rank) - self.ranks[layer]
            copies += extra * (rows + columns)
        return copies * self.source.dtype.itemsize

    @property
    def scratch(self) -> int:
        """Bytes of the buffers that packed matrices are dequantised into.

        Adapted layers share one buffer for their largest matrix; first factors of layers that read
        the same input are one matrix. A decoder layer without an adapter dequantises one matrix at
        a time into a further buffer.
        """
        shared, separate = 0, 0
        prefix = self.blocks.decoder.prefix
        packed = [
            layer
            for layer in self.source.linears
            if self._is_packed(layer) and layer.startswith(prefix)
        ]
        for layer in (layer for layer in packed if layer not in self.adapted):
            (rows, columns), k = self.source.linears[layer], self.ranks.get(layer)
            separate = max(separate, rows * columns if k is None else k * max(rows, columns))
        for group in names_by_input(layer for layer in packed if layer in self.adapted):
            stacked = 0
            for layer in group:
                (rows, columns), k = self.source.linears[layer], self.ranks.get(layer)
                height = rows if k is None else aligned_height(k + self.lora.rank)
                stacked += 0 if k is None else height * columns
                shared = max(shared, stacked, height * (columns if k is None else rows))
        return (shared + separate) * self.source.dtype.itemsize

    def trace_pass(self, step_shape: StepShape) -> TraceResult:
        """Trace one forward and backward pass: its temporary memory and its operations.

        Models of a few blocks are traced. Each further block adds as much as the last one did.
        """
        shallow, deep = (
            self.trace_depth(step_shape, depth) for depth in (TRACED_BLOCKS, TRACED_BLOCKS + 1)
        )
        further_blocks = self.blocks.count - TRACED_BLOCKS
        return TraceResult(
            shallow.peak + further_blocks * (deep.peak - shallow.peak),
            shallow.operations + further_blocks * (deep.operations - shallow.operations),
        )

    def trace_depth(self, step_shape: StepShape, depth: int) -> TraceResult:
        """Trace one forward and backward pass of a model with only `depth` decoder blocks."""
        model = self._model(depth)
        decoder, head = decoder_of(model), model.get_output_embeddings().weight
        hidden_size = head.shape[1]
        labels = torch.empty(step_shape.batch * step_shape.answer, dtype=torch.long, device="meta")
        count = torch.empty((), device="meta")

        def step() -> None:
            # A variable for the embeddings would keep them alive until the end of the step.
            hidden = decoder(
                inputs_embeds=head.new_empty(step_shape.batch, step_shape.length, hidden_size),
                use_cache=False,
            ).last_hidden_state
            answer_states = hidden[:, -step_shape.answer :].reshape(-1, hidden_size)
            loss: Tensor = AnswerLoss.apply(answer_states, head, labels, count)  # type: ignore[no-untyped-call]
            loss.backward()  # type: ignore[no-untyped-call]

        names = {name for name, _ in model.named_modules()}
        tuned = Lora().attach(model, self.lora, [name for name in self.adapted if name in names])
        fuse(tuned)
        fuse_modules(model, self.source.dtype)
        model.train()
        if step_shape.checkpointing:
            recompute_layers(model)
        if step_shape.host_activations:
            offload_layer_inputs(model)
        if step_shape.accumulate > 1:  # gradients of earlier passes are already allocated
            for parameter in tuned.parameters():
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        return trace(step)

    def _model(self, depth: int) -> PreTrainedModel:
        """Return a model of `depth` decoder blocks on the meta device, with factorised layers."""
        model = self.blocks.first(depth)
        meta_tensor = partial(torch.empty, dtype=self.source.dtype, device="meta")
        for name, module in list(model.named_modules()):
            if name in self.ranks:
                u = meta_tensor(module.out_features, self.ranks[name])
                v = meta_tensor(self.ranks[name], module.in_features)
                model.set_submodule(name, Factorized(u, v, module.bias))
        return model
