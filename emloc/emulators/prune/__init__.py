"""The original with whole neurons and key/value heads left out (one-shot UPop; LoRAM)."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from emloc.calibration.calibrate import Layers
from emloc.config.settings import MODEL_BITS, Compression
from emloc.emulators import BuildInputs, Emulator, Plan
from emloc.emulators.full import in_blocks, load_quantized
from emloc.emulators.offload import load_streamed
from emloc.emulators.prune.unit_scores import KINDS, importance, recompute_blocks
from emloc.emulators.prune.units import Units, units_of
from emloc.emulators.size import share_of_linears, size_facts, solved
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import CPU, Source
from emloc.precision import Precision, require_format
from emloc.runtime.manifest import whole
from emloc.runtime.safetensors_file import write_shard
from emloc.tensors.linalg.prune import keep_best, keep_evenly, least, spans

log = logging.getLogger(__name__)

SPREADS = {"global": keep_best, "layer": keep_evenly}
KEPT = "kept.safetensors"


@dataclass(frozen=True, kw_only=True)
class Prune(Emulator):
    """Fewer neurons and key/value heads in each block; what is left has its original weights.

    LoRAM's pruned models are aligned by training them further on much data; these are not.
    """

    importance: str  # upop: signed gradient of a mask; taylor: |w dL/dw|; random
    spread: str  # global: the best units of the whole model; layer: the same share of each module
    first: int  # blocks at the start of the decoder that are left whole
    last: int  # blocks at the end of the decoder that are left whole
    seed: int  # of importance=random

    same_shapes = False

    def __post_init__(self) -> None:
        for key, value, known in (
            ("importance", self.importance, (*KINDS, "random")),
            ("spread", self.spread, tuple(SPREADS)),
        ):
            if value not in known:
                raise ConfigError(
                    f"emulator.{key}={value}: one of {', '.join(known)}; "
                    f"set emulator.{key}={known[0]}"
                )
        if self.seed and self.importance != "random":
            raise ConfigError(
                f"emulator.seed={self.seed} is of emulator.importance=random; set emulator.seed=0"
            )
        for key, number in (("first", self.first), ("last", self.last)):
            if number < 0:
                raise ConfigError(
                    f"emulator.{key} must be at least 0, got {number}; set emulator.{key}=0"
                )

    @property
    def samples(self) -> bool:
        """Not where chance decides."""
        return self.importance != "random"

    def plan(self, source: Source, layers: Layers, budget: Compression) -> Plan:
        """The parameters that may be kept of `layers`, those of layers that stay whole included."""
        share = ratio = solved(budget.ratio)
        if budget.of == "model":
            share = share_of_linears(source, layers, ratio)
        units = self._units(source, layers)
        total = _numbers(layers)
        # But for rounding, the share of a number of parameters may be a whole number.
        allowed = int(round(share * total, 3))
        smallest = total - sum(one.count * one.size for one in units.values()) + least(units)
        if smallest > allowed:
            every = sum(source.sizes.values())
            before = every if budget.of == "model" else total
            possible = ceil((before - total + smallest) / before * 10_000) / 10_000
            ends = ", or emulator.first=0 emulator.last=0" if self.first or self.last else ""
            raise ConfigError(
                f"compression.ratio={ratio:g} is less than what stays whole and one unit of each "
                f"pruned module; set compression.ratio={possible:g} or more{ends}"
            )
        whole = _left_whole(units, layers)
        if whole:
            told = ", ".join(f"{name} ({count})" for name, count in whole.items())
            log.info("emulate: not pruned, but counted in compression.ratio: %s", told)
        return {"layers": list(layers), "parameters": allowed}

    def _units(self, source: Source, layers: Collection[str]) -> dict[str, Units]:
        """Those that may be pruned.

        Raises:
            ConfigError: there are none.
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
        host_bytes: int | None = None,
    ) -> dict[str, Any]:
        """Write the indices kept (`kept.safetensors`), the scores, and `layers.json`.

        For gradients two blocks are on the device, with the activations of one: the original is
        streamed from host memory as under emulator=offload.
        """
        assert build_inputs.plan is not None
        layers = {layer: source.linears[layer] for layer in build_inputs.plan["layers"]}
        units = self._units(source, layers)
        inside = sum(one.count * one.size for one in units.values())
        scores = self._scores(source, build_inputs, units, device)
        budget = build_inputs.plan["parameters"] - (_numbers(layers) - inside)
        kept = SPREADS[self.spread](units, scores, budget)
        write_shard(folder / KEPT, _indices(units, kept), {})
        write_shard(folder / "scores.safetensors", scores, {})

        table: dict[str, dict[str, Any]] = {
            layer: {"shape": list(source.linears[layer]), "bits": build_inputs.bits}
            for layer in (in_blocks(source) if build_inputs.precision else layers)
        }
        for name, one in units.items():
            left = len(kept[name])
            for dim, sizes in enumerate((one.rows, one.columns)):
                for layer, size in sizes.items():
                    table[layer]["shape"][dim] = left * size
                    table[layer] |= {"unit": one.kind, "kept": left, "of": one.count}
        (folder / "layers.json").write_text(json.dumps(table, indent=1))
        held = {layer: [line["shape"]] for layer, line in table.items()}
        facts = size_facts(source, held, build_inputs.precision, gone=_biases(source, units, kept))
        left = sum(len(kept[name]) * one.size for name, one in units.items())
        facts |= {
            "share_of_linears": round(1 - (inside - left) / _numbers(layers), 4),
            "whole": _left_whole(units, layers),
        }
        return facts | ({"samples": build_inputs.samples.ids} if build_inputs.samples else {})

    def _scores(
        self,
        source: Source,
        build_inputs: BuildInputs,
        units: Mapping[str, Units],
        device: torch.device,
    ) -> dict[str, Tensor]:
        if build_inputs.samples is None:
            generator = torch.Generator().manual_seed(self.seed)
            return {n: torch.rand(one.count, generator=generator) for n, one in units.items()}
        model = load_streamed(source, (), device)
        loss = source.objective.lean_loss(model)
        recompute_blocks(model)
        batches = build_inputs.samples.learnt(source)
        return importance(model, batches, units, self.importance, source.objective, loss)

    def kept(self, folder: Path, layer: str) -> tuple[Tensor | None, Tensor | None]:
        """The rows and the columns that are left of a layer, ascending; None where all are."""
        with safe_open(whole(folder / KEPT), framework="pt") as file:
            names, held = (f"{layer}.rows", f"{layer}.columns"), set(file.keys())
            rows, columns = (file.get_tensor(n) if n in held else None for n in names)
        return rows, columns

    def open(
        self,
        folder: Path,
        source: Source,
        device: torch.device,
        *,
        precision: Precision | None = None,
    ) -> PreTrainedModel:
        """The original with smaller layers; one weight at a time is read whole, and cut."""
        table = json.loads((folder / "layers.json").read_text())
        smaller: dict[str, nn.Module] = {}
        whole: list[str] = []  # of the packed ones, those that are not cut
        for layer, line in table.items():
            packed = line["bits"] != MODEL_BITS
            rows, columns = self.kept(folder, layer)
            if rows is not None or columns is not None:
                weight = _cut(_cut(source.weight(layer, device), rows, 0), columns, 1)
                bias = source.bias(layer, device)
                bias = None if bias is None else _cut(bias, rows, 0)
                held = require_format(precision) if packed else None
                smaller[layer] = _linear(weight, bias, held)
            elif packed:
                whole.append(layer)
        return load_quantized(source, whole, device, precision, smaller)

    def residual(
        self,
        folder: Path,
        source: Source,
        layer: str,
        device: torch.device = CPU,
        *,
        precision: Precision | None = None,
    ) -> None:
        """None: a smaller layer takes and gives something else than the original."""


def _numbers(layers: Layers) -> int:
    return sum(rows * columns for rows, columns in layers.values())


def _left_whole(units: Mapping[str, Units], layers: Collection[str]) -> dict[str, int]:
    """How many layers have no units to prune, by name with the numbers taken out."""
    cut = {layer for one in units.values() for layer in one.layers}
    return dict(Counter(re.sub(r"\d+", "*", layer) for layer in layers if layer not in cut))


def _indices(units: Mapping[str, Units], kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`<layer>.rows` and `<layer>.columns` of the modules that lose a unit."""
    found: dict[str, Tensor] = {}
    for name, one in units.items():
        if len(kept[name]) < one.count:
            found |= {f"{n}.rows": spans(kept[name], size) for n, size in one.rows.items()}
            found |= {f"{n}.columns": spans(kept[name], size) for n, size in one.columns.items()}
    return found


def _biases(source: Source, units: Mapping[str, Units], kept: Mapping[str, Tensor]) -> int:
    """Numbers that are cut from biases."""
    return sum(
        (one.count - len(kept[name])) * size
        for name, one in units.items()
        for layer, size in one.rows.items()
        if f"{layer}.bias" in source.sizes
    )


def _cut(tensor: Tensor, kept: Tensor | None, dim: int) -> Tensor:
    return tensor if kept is None else tensor.index_select(dim, kept.to(tensor.device))


def _linear(weight: Tensor, bias: Tensor | None, precision: Precision | None) -> nn.Module:
    if precision is not None:
        return precision.linear(precision.quantize(weight), bias)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer
