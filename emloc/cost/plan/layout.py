"""Sizes of a model and its adapter as a method trains them, and a trace of one training pass."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from emloc.adapters.fused import fuse
from emloc.adapters.lora import Lora
from emloc.calibration.calibrate import Layers
from emloc.config.settings import LoraSettings, TrainSettings
from emloc.cost.plan.blocks import DecoderBlocks
from emloc.cost.plan.trace import TraceResult, trace
from emloc.emulators import Ranks
from emloc.emulators.size import (
    Groups,
    bytes_of,
    factor_shapes,
    first_layers,
    followers,
    stacked_shape,
)
from emloc.models.block_names import IN_A_BLOCK, find_block
from emloc.models.checkpoint.source import Source
from emloc.models.decoder import decoder_of
from emloc.models.shared_inputs import names_by_input
from emloc.precision import Precision, has_feedback
from emloc.runtime.digest import digest
from emloc.tensors.lean.activations import offload_layer_inputs
from emloc.tensors.lean.layers import aligned_height
from emloc.tensors.lean.loss import CHUNK_BYTES, AnswerLoss
from emloc.tensors.lean.model import recompute_layers
from emloc.tensors.lean.modules import fuse_modules
from emloc.tensors.nn.factorized import Factorized

# Depth of the shallower of two traced models. Each further block adds the same memory.
TRACED_BLOCKS = 2
# The traces of this process, by all that they depend on.
_TRACES: dict[str, TraceResult] = {}


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
    pass_bytes: int = 0  # device memory of a pass of the original beside that of the emulator
    captured: bool = False  # whether each pass is one CUDA graph

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
            captured=recipe.capture,
        )


@dataclass(frozen=True)
class TrainingLayout:
    """Layers of a model in training: which of them are adapted, factorised and packed."""

    blocks: DecoderBlocks
    adapted: Layers  # layers with a LoRA
    compressed: Layers  # layers that the emulator may compress
    lora: LoraSettings
    ranks: Ranks  # rank of each factorised layer; empty: no layer is factorised
    groups: Groups  # factorised layers that have one v, or each its own
    precision: (
        Precision | None
    )  # packed format of factorised layers; without ranks, of all layers in blocks
    streamed: bool = False  # whether the blocks wait in host memory, and come in turn

    @property
    def source(self) -> Source:
        """The model whose training is planned."""
        return self.blocks.source

    @property
    def weights(self) -> int:
        """Bytes of all frozen weights on the device."""
        embedding = self.blocks.decoder.untied_embedding
        total = sum(self._parameter_bytes(name) for name in self.source.sizes if name != embedding)
        if not self.streamed:
            return total
        return total - self.streamed_bytes + 2 * max(self._streamed_blocks.values(), default=0)

    def _parameter_bytes(self, name: str) -> int:
        """Return the bytes of a frozen parameter, by its full name."""
        layer = name.removesuffix(".weight")
        if layer in self.source.linears:
            return self._layer_bytes(layer)
        return self.source.sizes[name] * self.source.dtype.itemsize

    @property
    def streamed_bytes(self) -> int:
        """Bytes of all blocks in host memory; 0 if none is."""
        return sum(self._streamed_blocks.values()) if self.streamed else 0

    @cached_property
    def _streamed_blocks(self) -> dict[str, int]:
        """Bytes of each block that its buffer holds: all but the parameters of the block itself."""
        blocks: dict[str, int] = {}
        for name in self.source.sizes:
            block = find_block(name)
            if block is not None and "." in name.removeprefix(f"{block}."):
                blocks[block] = blocks.get(block, 0) + self._parameter_bytes(name)
        return blocks

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

    @property
    def has_feedback(self) -> bool:
        """Whether the packed format chooses codes by error feedback, when the emulator is built."""
        return has_feedback(self.precision)

    @property
    def packed_layers(self) -> list[str]:
        """Names of the packed layers."""
        return [layer for layer in self.source.linears if self._is_packed(layer)]

    @property
    def packed_bytes(self) -> int:
        """Bytes of all packed layers."""
        return sum(self._layer_bytes(layer) for layer in self.packed_layers)

    def multiplications(self, layer: str) -> int:
        """Return the number of multiplications of one token in a layer: the layer's parameters."""
        return sum(rows * columns for rows, columns in self._matrices(layer))

    def _matrices(self, layer: str) -> list[tuple[int, int]]:
        """Return the shapes of a layer's matrices: the weight, or its factors."""
        shape, rank = self.source.linears[layer], self.ranks.get(layer)
        if rank is None:
            return [shape]
        return factor_shapes(shape, rank, with_v=layer not in self._without_v)

    @cached_property
    def _without_v(self) -> set[str]:
        """Factorised layers that use the v of another layer."""
        return followers(self.groups)

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
        precision = self.precision if self._is_packed(layer) else None
        return bytes_of(self._matrices(layer), precision, self.source.dtype)

    @property
    def parameters(self) -> int:
        """Number of trainable parameters, which are in float32."""
        return sum(self.lora.rank * (m + n) for m, n in self.adapted.values())

    @property
    def copies(self) -> int:
        """Bytes of the adapter's copies in the model's dtype, which the fused layers use."""
        copies = 0
        for group in self._fused(self.adapted):
            extra = self.lora.rank * len(group)
            if group[0] in self.ranks and self.precision is None:
                extra = self._height(group) - self.ranks[group[0]]
            rows, columns = stacked_shape(group, self.adapted)
            copies += extra * (rows + columns)
        return copies * self.source.dtype.itemsize

    def _fused(self, layers: Iterable[str]) -> list[list[str]]:
        """Return those of some layers that have one v, and each other one alone."""
        first = first_layers(self.groups)
        fused: dict[str, list[str]] = {}
        for layer in layers:
            fused.setdefault(first.get(layer, layer), []).append(layer)
        return list(fused.values())

    def _height(self, group: Sequence[str]) -> int:
        """Return the rows of v and of the LoRAs of layers with one v."""
        return aligned_height(self.ranks[group[0]] + self.lora.rank * len(group))

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
            for same_v in self._fused(group):
                is_matrix = same_v[0] not in self.ranks
                for layer in same_v:
                    rows, columns = self.source.linears[layer]
                    height = rows if is_matrix else self._height(same_v)
                    shared = max(shared, height * (columns if is_matrix else rows))
                stacked += 0 if is_matrix else height * columns
                shared = max(shared, stacked)
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
        """Trace one forward and backward pass of a model with only `depth` decoder blocks.

        Equal passes are traced once in a process: most runs of a sweep have the same one.
        """
        # A second pass allocates as much as any further one, and offsets are counted apart.
        step_shape = replace(
            step_shape, offsets=0, pass_bytes=0, accumulate=min(step_shape.accumulate, 2)
        )
        layers = [self.source.key, self.adapted, self.ranks, self.groups, asdict(self.lora)]
        key = digest([layers, asdict(step_shape), depth])
        if key not in _TRACES:
            _TRACES[key] = self._trace_depth(step_shape, depth)
        return _TRACES[key]

    def _trace_depth(self, step_shape: StepShape, depth: int) -> TraceResult:
        """Trace a pass as `trace_depth` does, each time."""
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
        modules = dict(model.named_modules())
        for names in self._fused(name for name in modules if name in self.ranks):
            rank = self.ranks[names[0]]
            v = nn.Parameter(meta_tensor(rank, modules[names[0]].in_features), requires_grad=False)
            for name in names:
                u = meta_tensor(modules[name].out_features, rank)
                model.set_submodule(name, Factorized(u, v, modules[name].bias))
        return model
