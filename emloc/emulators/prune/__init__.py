"""Structured pruning: remove neurons and key/value heads (one-shot UPop; LoRAM)."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from emloc.calibration.blockwise import by_block, rows_of
from emloc.calibration.calibrate import Layers
from emloc.calibration.offload import UNLIMITED, StateLimits
from emloc.config.settings import MODEL_BITS, Compression
from emloc.config.values import SEED, OneOf, Range
from emloc.emulators import BuildInputs, Emulator, Plan
from emloc.emulators.full import block_linears, load_quantized
from emloc.emulators.offload import load_streamed
from emloc.emulators.operations import block_operations, layer_operations
from emloc.emulators.packed_weights import packed_weight, select, select_both, write_packed
from emloc.emulators.prune.unit_scores import KINDS, importance, recompute_blocks
from emloc.emulators.prune.units import Units, units_of
from emloc.emulators.size import require_solved, share_of_linears, size_facts
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import CPU, Source
from emloc.models.coverage import require_linear_blocks
from emloc.precision import Precision, require_format
from emloc.runtime.manifest import verified_file
from emloc.runtime.safetensors_file import write_safetensors
from emloc.runtime.work_meter import count_operations
from emloc.tensors.linalg.prune import keep_best, keep_evenly, minimum_parameters, unit_indices

log = logging.getLogger(__name__)

SPREADS = {"global": keep_best, "layer": keep_evenly}
KEPT = "kept.safetensors"


@dataclass(frozen=True, kw_only=True)
class Prune(Emulator):
    """Removes neurons and key/value heads; the remaining units keep their original weights.

    Unlike LoRAM, it does not align the pruned model by further training on much data.
    """

    leaves_out_tower = True

    # upop: signed gradient of a mask; taylor: |w dL/dw|; random
    importance: Annotated[str, OneOf(*KINDS, "random")]
    # global: the best units of the whole model; layer: the same share of each module
    spread: Annotated[str, OneOf("global", "layer")]
    # number of blocks at the start of the decoder that are not pruned
    first: Annotated[int, Range(least=0, usual=0)]
    # number of blocks at the end of the decoder that are not pruned
    last: Annotated[int, Range(least=0, usual=0)]
    seed: Annotated[int, SEED]  # of importance=random

    same_shapes = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seed and self.importance != "random":
            raise ConfigError(
                f"emulator.seed={self.seed} has an effect with emulator.importance=random only; "
                "set emulator.seed=0"
            )

    @property
    def samples(self) -> bool:
        """Whether the build reads calibration samples; random pruning does not."""
        return self.importance != "random"

    def plan(self, source: Source, layers: Layers, budget: Compression) -> Plan:
        """Number of parameters to keep in `layers`, including layers that cannot be pruned.

        Raises:
            ConfigError: the budget cannot be met, nothing can be pruned, or most parameters are in
                no linear layer.
        """
        require_linear_blocks(
            source.meta_model, by_block(layers), "emulator=prune", "set model to another"
        )
        share = ratio = require_solved(budget.ratio)
        if budget.of == "model":
            share = share_of_linears(source, layers, ratio)
        units = self._units(source, layers)
        total = _parameters(layers)
        # Rounded first, since the product may be 2.9999999 where it should be 3.
        allowed = int(round(share * total, 3))
        prunable = sum(group.count * group.size for group in units.values())
        smallest = total - prunable + minimum_parameters(units)
        if smallest > allowed:
            all_parameters = sum(source.sizes.values())
            before = all_parameters if budget.of == "model" else total
            possible = ceil((before - total + smallest) / before * 10_000) / 10_000
            ends = ", or emulator.first=0 emulator.last=0" if self.first or self.last else ""
            raise ConfigError(
                f"compression.ratio={ratio:g} is less than the share of unpruned layers and one "
                f"unit of each pruned module; set compression.ratio={possible:g} or more{ends}"
            )
        unpruned = _unpruned_layers(units, layers)
        if unpruned:
            counts = ", ".join(f"{name} ({count})" for name, count in unpruned.items())
            log.info("prune: these layers are not pruned, but count in the ratio: %s", counts)
        return {"layers": list(layers), "parameters": allowed}

    def _units(self, source: Source, layers: Collection[str]) -> dict[str, Units]:
        """Module name -> units that may be pruned.

        Raises:
            ConfigError: no module has any.
        """
        units = units_of(source, layers, self.first, self.last)
        if units:
            return units
        if (self.first or self.last) and units_of(source, layers, 0, 0):
            raise ConfigError(
                f"emulator.first={self.first} and emulator.last={self.last} leave no block of "
                f"{source.name} to prune; set emulator.first=0 emulator.last=0"
            )
        raise ConfigError(
            f"emulator=prune: {source.name} has no MLP (gate_proj, up_proj, down_proj; fc1, fc2) "
            "or decoder attention (q_proj, k_proj, v_proj, o_proj) whose linears may all be "
            "compressed; set model.emulator_targets"
        )

    def build(
        self,
        folder: Path,
        source: Source,
        build_inputs: BuildInputs,
        *,
        device: torch.device,
        limits: StateLimits = UNLIMITED,
    ) -> dict[str, Any]:
        """Write the kept indices (`kept.safetensors`), the units' scores, and `layers.json`.

        To compute gradients, the original is streamed from host memory as with emulator=offload:
        at most two blocks and the activations of one are on the device.
        """
        assert build_inputs.plan is not None
        layers = {layer: source.linears[layer] for layer in build_inputs.plan["layers"]}
        units = self._units(source, layers)
        prunable = sum(group.count * group.size for group in units.values())
        scores = self._scores(source, build_inputs, units, device)
        budget = build_inputs.plan["parameters"] - (_parameters(layers) - prunable)
        kept_units = SPREADS[self.spread](units, scores, budget)
        write_safetensors(folder / KEPT, _kept_indices(units, kept_units), {})
        write_safetensors(folder / "scores.safetensors", scores, {})

        table: dict[str, dict[str, Any]] = {
            layer: {"shape": list(source.linears[layer]), "bits": build_inputs.bits}
            for layer in (block_linears(source) if build_inputs.precision else layers)
        }
        for name, group in units.items():
            count = len(kept_units[name])
            for dim, sizes in enumerate((group.rows, group.columns)):
                for layer, size in sizes.items():
                    table[layer]["shape"][dim] = count * size
                    table[layer] |= {"unit": group.kind, "kept": count, "of": group.count}
        write_packed(
            folder,
            source,
            [layer for layer, row in table.items() if row["bits"] != MODEL_BITS],
            build_inputs,
            device=device,
            limits=limits,
            selection=partial(self.kept_indices, folder),
        )
        (folder / "layers.json").write_text(json.dumps(table, indent=1))
        stored = {layer: [row["shape"]] for layer, row in table.items()}
        removed_biases = _removed_biases(source, units, kept_units)
        facts = size_facts(source, stored, build_inputs.precision, removed_biases)
        remaining = sum(len(kept_units[name]) * group.size for name, group in units.items())
        facts |= {
            "share_of_linears": round(1 - (prunable - remaining) / _parameters(layers), 4),
            "whole": _unpruned_layers(units, layers),
        }
        return facts | build_inputs.sample_facts

    def _scores(
        self,
        source: Source,
        build_inputs: BuildInputs,
        units: Mapping[str, Units],
        device: torch.device,
    ) -> dict[str, Tensor]:
        """Module name -> a score (count,) for each unit, higher for units to keep."""
        if not self.samples:
            generator = torch.Generator().manual_seed(self.seed)
            return {
                name: torch.rand(group.count, generator=generator) for name, group in units.items()
            }
        model = load_streamed(source, (), device)
        loss = source.objective.lean_loss(model)
        recompute_blocks(model)
        assert build_inputs.samples is not None
        batches = build_inputs.samples.training_batches(source)
        operations = 3 * block_operations(source)  # forward, recomputation, gradients of inputs
        if self.importance == "taylor":  # gradients of weights
            layers = {layer for group in units.values() for layer in group.layers}
            operations += layer_operations(source, layers)
        count_operations(sum(map(rows_of, batches)) * operations)
        return importance(model, batches, units, self.importance, source.objective, loss)

    def kept_indices(self, folder: Path, layer: str) -> tuple[Tensor | None, Tensor | None]:
        """Ascending indices of a layer's kept rows and of its kept columns; None: all are kept."""
        with safe_open(verified_file(folder / KEPT), framework="pt") as file:
            names, keys = (f"{layer}.rows", f"{layer}.columns"), set(file.keys())
            rows, columns = (file.get_tensor(n) if n in keys else None for n in names)
        return rows, columns

    def open(
        self,
        folder: Path,
        source: Source,
        device: torch.device,
        *,
        precision: Precision | None = None,
    ) -> PreTrainedModel:
        """Load the pruned model, frozen; the original weights are read and pruned one by one."""
        table = json.loads((folder / "layers.json").read_text())
        pruned: dict[str, nn.Module] = {}
        selection = partial(self.kept_indices, folder)
        only_packed: list[str] = []  # layers that are packed, but not pruned
        for layer in source.emulated(table):
            packed = table[layer]["bits"] != MODEL_BITS
            rows, columns = selection(layer)
            if rows is not None or columns is not None:
                bias = source.bias(layer, device)
                bias = None if bias is None else select(bias, rows, 0)
                if packed:
                    layer_format = require_format(precision)
                    matrix = packed_weight(source, layer, device, layer_format, folder, selection)
                    pruned[layer] = layer_format.linear(matrix, bias)
                else:
                    weight = select_both(source.weight(layer, device), (rows, columns))
                    pruned[layer] = _linear(weight, bias)
            elif packed:
                only_packed.append(layer)
        return load_quantized(source, only_packed, device, precision, pruned, folder)

    def residual(
        self,
        folder: Path,
        source: Source,
        layer: str,
        device: torch.device = CPU,
        *,
        precision: Precision | None = None,
    ) -> None:
        """Return None: a pruned weight has another shape, so there is no difference to compute."""


def _parameters(layers: Layers) -> int:
    """Number of parameters in the weights of all layers."""
    return sum(rows * columns for rows, columns in layers.values())


def _unpruned_layers(units: Mapping[str, Units], layers: Collection[str]) -> dict[str, int]:
    """Layers without units to prune: name with * instead of numbers -> how many there are."""
    prunable = {layer for group in units.values() for layer in group.layers}
    return dict(Counter(re.sub(r"\d+", "*", layer) for layer in layers if layer not in prunable))


def _kept_indices(
    units: Mapping[str, Units], kept_units: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Kept indices as `<layer>.rows` and `<layer>.columns`, for modules that lose any unit."""
    indices: dict[str, Tensor] = {}
    for name, group in units.items():
        unit_numbers = kept_units[name]
        if len(unit_numbers) < group.count:
            indices |= {
                f"{n}.rows": unit_indices(unit_numbers, size) for n, size in group.rows.items()
            }
            indices |= {
                f"{n}.columns": unit_indices(unit_numbers, size)
                for n, size in group.columns.items()
            }
    return indices


def _removed_biases(
    source: Source, units: Mapping[str, Units], kept_units: Mapping[str, Tensor]
) -> int:
    """Number of bias entries that pruning removes."""
    return sum(
        (group.count - len(kept_units[name])) * size
        for name, group in units.items()
        for layer, size in group.rows.items()
        if f"{layer}.bias" in source.sizes
    )


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A frozen linear layer with this weight."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer
