"""What a training with anchors takes beside one without: offsets, and passes of the original."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import inf

import torch

from emloc.anchors import Anchor
from emloc.anchors.pass_states import most_states
from emloc.anchors.places import Place
from emloc.anchors.write_behind import MOST_WAITING
from emloc.calibration.offload import StateLimits, state_limits
from emloc.config.compatibility import choice_name
from emloc.config.settings import Budget, TrainSettings
from emloc.cost.plan.blocks import DecoderBlocks
from emloc.cost.plan.cost import (
    DISK,
    PROCESS,
    TrainingCost,
    forward_seconds,
    next_block,
    weight_bytes,
)
from emloc.cost.plan.gpus import Gpu
from emloc.cost.plan.layout import StepShape, TrainingLayout
from emloc.cost.plan.trace import trace
from emloc.emulators.full import Full
from emloc.emulators.layer_drop import block_stack
from emloc.models.block_names import find_block
from emloc.models.checkpoint.source import Source
from emloc.models.decoder import Decoder, decoder_of
from emloc.runtime.memory import GIB
from emloc.stages.anchorable import require_anchorable
from emloc.stages.run_config import RunConfig
from emloc.stages.training.anchored_rows import round_ends
from emloc.stages.training.refit import gradient_bytes


@dataclass(frozen=True)
class AnchorPlan:
    """Sizes of an anchored training, if every row is as long as the longest."""

    anchor: Anchor
    source: Source
    places: list[Place]
    step_shape: StepShape
    recipe: TrainSettings
    budget: Budget
    device_gib: float = inf  # memory of the GPU, for the hidden states that wait on it

    @property
    def choice(self) -> str:
        """The choice of the group `anchor`."""
        return choice_name(self.anchor)

    @property
    def _width(self) -> int:
        width: int = self.source.config.get_text_config().hidden_size
        return width

    @property
    def round_rows(self) -> int:
        """Rows of the longest round. A row that is drawn twice in a round is stored once."""
        ends = round_ends(self.recipe.steps, self.anchor.rounds)
        steps = max(end - start for start, end in zip([0, *ends], ends, strict=False))
        return steps * self.recipe.batch * self.recipe.accumulate

    @property
    def batch_offsets(self) -> int:
        """Bytes of the offsets of one forward pass on the device, which padding takes, too."""
        tokens = self.step_shape.batch * self.step_shape.length
        return tokens * len(self.places) * self._token_bytes

    @cached_property
    def pass_bytes(self) -> int:
        """Bytes of the device that a pass of the original takes beside the emulator's.

        They are those of the largest block, of the weights outside the blocks, of the temporary
        tensors of one row in a block, and of the hidden states that wait. The emulator has the
        head, and the token embedding is there, too, or in host memory. A block of a vision tower is
        smaller than one of the language model.
        """
        model = self.source.meta_model
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        at_ends = {id(weight) for end in ends if end is not None for weight in end.parameters()}
        sizes: dict[str | None, int] = {None: 0}
        for name, weight in model.named_parameters():
            if id(weight) not in at_ends:
                block = find_block(name)
                sizes[block] = sizes.get(block, 0) + weight.numel() * self.source.dtype.itemsize
        outside = sizes.pop(None)
        waiting = self._limits.device_share(self.states)
        return max(sizes.values()) + outside + self._temporary_bytes() + waiting

    def _temporary_bytes(self) -> int:
        """Trace the temporary tensors of one row in a block, without gradients."""
        model = DecoderBlocks(self.source).first(1)
        decoder, dtype = decoder_of(model), self.source.dtype

        def forward() -> None:
            shape = (1, self.step_shape.length, self._width)
            decoder(inputs_embeds=torch.empty(shape, dtype=dtype, device="meta"), use_cache=False)

        with torch.no_grad():
            return trace(forward).peak

    @property
    def round_offsets(self) -> int:
        """Bytes of the offsets of a round on the disk."""
        return self.round_rows * sum(self._row_tokens) * self._token_bytes

    @property
    def _row_tokens(self) -> list[int]:
        """For each place, tokens of a row with an offset."""
        shape = self.step_shape
        return [shape.answer if place.predicting_only else shape.length for place in self.places]

    @property
    def _token_bytes(self) -> int:
        return self.anchor.stored_as.token_bytes(self._width)

    @property
    def states(self) -> int:
        """Bytes of the hidden states of all rows of a round, of the original and the emulator."""
        tokens = self.round_rows * self.step_shape.length
        return 2 * tokens * self._width * self.source.dtype.itemsize

    @property
    def host(self) -> int:
        """Bytes of host memory of a pass, with the token embedding that training keeps there.

        The next block of the original waits there, too, and states that are not written yet.
        """
        embedding = Decoder(self.source).untied_embedding
        size = self.source.sizes[embedding] * self.source.dtype.itemsize if embedding else 0
        waiting = next_block(self.source) + self._limits.host_share(self.states)
        return PROCESS + size + waiting + min(MOST_WAITING, self.states // 2)

    @property
    def disk(self) -> int:
        """Bytes of disk of a pass: offsets, states behind two places, states beyond the host's."""
        tokens = [self.round_rows * count for count in self._row_tokens]
        behind_places = most_states(tokens, self._width * self.source.dtype.itemsize)
        return self.round_offsets + behind_places + self._limits.disk_share(self.states)

    @property
    def _limits(self) -> StateLimits:
        return state_limits(self.budget, self.device_gib * GIB)

    @property
    def reads(self) -> int:
        """How often the original's weights are read: for each round, and for the last guard."""
        return self.anchor.rounds + bool(self.anchor.guard)

    def added_to(self, cost: TrainingCost, layout: TrainingLayout, gpu: Gpu) -> TrainingCost:
        """Return the cost of a training through `layout`, with that of its passes.

        The offsets of the first round stay in the cache beside those of a later round. A fit of the
        emulator behind a round writes gradients and factors.
        """
        first_round = self.round_offsets if self.anchor.rounds > 1 else 0
        refit = 0
        if first_round and self.anchor.refit and layout.ranks:
            refit = gradient_bytes(self.source, layout.ranks) + layout.factors
        return replace(
            cost,
            host=max(cost.host, self.host),
            disk=cost.disk + first_round + max(self.disk, self.round_offsets + refit),
            read=cost.read + self.reads * weight_bytes(self.source),
            pass_seconds=self.anchor.rounds * self._round_seconds(layout, gpu)
            + self._last_seconds(layout, gpu),
            first_pass_seconds=self._round_seconds(layout, gpu),
        )

    def _round_seconds(self, layout: TrainingLayout, gpu: Gpu) -> float:
        """Estimate the time of a round's pass: the original's, the emulator's, and the offsets.

        A thread reads the next block of the original while the present one runs.
        """
        recipe, length = self.recipe, self.step_shape.length
        rows = recipe.steps * recipe.batch * recipe.accumulate / self.anchor.rounds
        tokens = (rows + self.anchor.guard) * length
        original = forward_seconds(_whole(layout), tokens, gpu)
        offsets = rows * sum(self._row_tokens) * self._token_bytes
        reading = weight_bytes(self.source) / DISK
        return max(reading, original) + forward_seconds(layout, tokens, gpu) + offsets / DISK

    def _last_seconds(self, layout: TrainingLayout, gpu: Gpu) -> float:
        """Estimate the time of the last pass, which only measures the guard's loss."""
        tokens = self.anchor.guard * self.step_shape.length
        if not tokens:
            return 0.0
        return max(weight_bytes(self.source) / DISK, forward_seconds(_whole(layout), tokens, gpu))

    def lines(self) -> list[str]:
        """Return what a user has to know before anything is computed, in sentences."""
        anchor, shape = self.anchor, self.step_shape
        weights = weight_bytes(self.source)
        limit, excess = self.budget.disk_gib, ""
        if self.round_offsets > limit * GIB:
            excess = (
                f"; this is more than budget.disk_gib={limit:g}, so set anchor.rounds or "
                "budget.disk_gib higher, anchor.dtype=int8, or --length to the rows' mean length"
            )
        return [
            f"anchor={self.choice}: the offsets of a round take {self.round_offsets / GIB:.3g} GiB "
            f"of disk ({self.round_rows} rows of {shape.length} tokens, {_places(self.places)}, "
            f"{anchor.dtype}); those of the first round stay in the cache{excess}",
            f"anchor={self.choice}: a pass over a round takes {self.host / GIB:.3g} GiB of host "
            f"memory, and {self.disk / GIB:.3g} GiB of disk with the offsets; beside the emulator "
            f"it takes {self.pass_bytes / GIB:.3g} GiB of the GPU, of which "
            f"{self._limits.device_share(self.states) / GIB:.3g} GiB are hidden states that wait",
            f"anchor={self.choice}: the original's weights are read {self.reads} times, "
            f"{self.reads * weights / GIB:.3g} GiB in all",
        ]


def anchor_plan(
    run_config: RunConfig, source: Source, step_shape: StepShape, device_gib: float | None = None
) -> AnchorPlan | None:
    """Return the plan of the run's anchors on a GPU of some memory; None without anchors.

    Without `device_gib` the memory is that of the run's budget.

    Raises:
        ConfigError: the model does not have the places, or the emulator cannot be put back.
    """
    anchor = run_config.anchor
    if not anchor.anchors:
        return None
    layers = run_config.model.adapted_layers(source)
    # Left open bits are solved for, so that the emulator is no original.
    is_original = isinstance(run_config.emulator, Full) and run_config.compression.bits is not None
    require_anchorable(run_config, source, layers, is_original=is_original)
    places = anchor.find(source.meta_model, block_stack(source))
    recipe, budget = run_config.train, run_config.budget
    if device_gib is None:
        device_gib = budget.gpu_gib or inf
    return AnchorPlan(anchor, source, places, step_shape, recipe, budget, device_gib)


def with_offsets(step_shape: StepShape, anchors: AnchorPlan | None) -> StepShape:
    """Return the shape of a step that has offsets on the device, and passes before it."""
    if anchors is None:
        return replace(step_shape, offsets=0, pass_bytes=0)
    return replace(step_shape, offsets=anchors.batch_offsets, pass_bytes=anchors.pass_bytes)


def _whole(layout: TrainingLayout) -> TrainingLayout:
    """Return the layout of the original itself."""
    return replace(layout, ranks={}, groups=(), precision=None, streamed=False)


def _places(places: list[Place]) -> str:
    return f"{len(places)} place{'s' if len(places) > 1 else ''}"
