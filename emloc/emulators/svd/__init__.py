"""EMLoC's emulator: every targeted linear is replaced by two low-rank factors."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from emloc.calibration.blockwise import Block, block_of, by_block
from emloc.calibration.calibrate import Layers, linears_of, record_moments
from emloc.calibration.moments import Statistics
from emloc.calibration.named_blocks import named_blocks, weights_of
from emloc.calibration.offload import UNLIMITED, StateLimits
from emloc.config.settings import Compression
from emloc.config.values import OneOf, Range
from emloc.emulators import BuildInputs, Emulator, Ranks
from emloc.emulators.size import (
    first_layers,
    joint_layers,
    size_facts,
    stacked_shape,
    stored_shapes,
    uniform_ranks,
)
from emloc.emulators.svd.factor_file import load_factors
from emloc.emulators.svd.factor_writer import FactorWriter
from emloc.emulators.svd.factors import LayerFactors, factorize, refine, spectra
from emloc.emulators.svd.sequential import BlockPair, fit_block, lock_step
from emloc.models.checkpoint.source import CPU, Source
from emloc.models.coverage import require_linear_blocks
from emloc.models.shared_inputs import names_by_input, names_by_stored_tensor
from emloc.precision import Precision
from emloc.runtime.atomic import write_text
from emloc.runtime.journal import Journal
from emloc.runtime.keys import neutral
from emloc.runtime.manifest import verified_file
from emloc.runtime.progress import tracked
from emloc.runtime.safetensors_file import write_safetensors
from emloc.tensors.linalg.allocate import greedy


@dataclass(frozen=True, kw_only=True)
class Svd(Emulator):
    """Low-rank factors that keep the most output energy of each layer (EMLoC, stage 1)."""

    leaves_out_tower = True

    # subspace: fast iteration; eigen: one eigendecomposition; whiten: the authors' whitened SVD
    algorithm: Annotated[str, OneOf("subspace", "eigen", "whiten")]
    aware: bool  # weight by the calibration activations; false: plain truncated SVD of the weight
    multiple: Annotated[int, Range(least=1, usual=1)]  # ranks are rounded down to a multiple of it
    sequential: bool = neutral(False)  # fit each layer to the outputs of compressed earlier layers
    # greedy: higher ranks for layers that lose more energy
    allocation: Annotated[str, OneOf("uniform", "greedy")] = neutral("uniform")
    # One v for layers that read the same input. checkpoint: if the checkpoint stores their weights
    # as one tensor; inputs: query, key and value, and gate and up
    shared: Annotated[str, OneOf("none", "checkpoint", "inputs")] = neutral("none")

    conflicts: ClassVar[Any] = (
        (
            {"algorithm": "whiten", "aware": False},
            "emulator.aware=false leaves no activations to whiten; set emulator.algorithm=eigen",
        ),
        (
            {"sequential": True, "aware": False},
            "emulator.sequential=true needs calibration activations, which "
            "emulator.aware=false does not use; set emulator.sequential=false",
        ),
        (
            {"sequential": True, "algorithm": "whiten"},
            "emulator.algorithm=whiten cannot be combined with emulator.sequential=true; "
            "set emulator.algorithm=eigen, or emulator.sequential=false",
        ),
    )

    def plan(self, source: Source, layers: Layers, budget: Compression) -> Ranks:
        """Return uniform ranks; greedy ranks, chosen in the build, cost no more parameters.

        Raises:
            ConfigError: the budget cannot be met, or most parameters are in no linear layer.
        """
        require_linear_blocks(
            source.meta_model, by_block(layers), "emulator=svd", "set model to another"
        )
        return uniform_ranks(source, layers, budget, self.multiple, self.groups(source, layers))

    keeps_weights = False

    def reads_samples(self, precision: Precision | None) -> bool:
        """Return `samples`: factors of a plain SVD are quantised to the nearest codes."""
        return self.samples

    def groups(self, source: Source, layers: Iterable[str]) -> list[list[str]]:
        """Return the names of the layers of each factorisation: those that get one v."""
        if self.shared == "inputs":
            return names_by_input(layers)
        if self.shared == "checkpoint":
            return names_by_stored_tensor(source, layers)
        return [[layer] for layer in layers]

    def joint(self, source: Source, layers: Collection[str]) -> set[str]:
        """Return the layers that share a v: the outputs of one of them do not determine it."""
        return joint_layers(self.groups(source, layers))

    @property
    def samples(self) -> bool:
        """Whether the build reads calibration samples; a plain SVD does not."""
        return self.aware

    @property
    def statistics(self) -> str | None:
        """Second moments of the original that the build reads; see `Emulator.statistics`.

        Whitening needs the input Gram of every layer. A sequential build computes its own moments;
        only greedy ranks need those of the original.
        """
        if not self.aware or (self.sequential and self.allocation == "uniform"):
            return None
        return "input" if self.algorithm == "whiten" else "smaller"

    def build(
        self,
        folder: Path,
        source: Source,
        build_inputs: BuildInputs,
        *,
        device: torch.device,
        limits: StateLimits = UNLIMITED,
    ) -> dict[str, Any]:
        """Write one file of factors per block; an interrupted build skips finished blocks.

        The weights of one block are in memory at a time; a `sequential` build holds them twice,
        once for each model. Without cached statistics, each block's statistics are computed right
        before its factors and then discarded.

        Further files: `journal.jsonl` has a line per finished block, `layers.json` a line per
        layer with rank, kept energy, seconds and a part of the spectrum, and `spectra.safetensors`
        the full spectra that greedy ranks are chosen by.
        """
        if self.allocation == "greedy":
            ranks = self._greedy_ranks(folder, source, build_inputs, device, limits)
            build_inputs = replace(build_inputs, plan=ranks)
        assert build_inputs.plan is not None
        ranks, statistics = build_inputs.plan, build_inputs.statistics
        layers_by_block = by_block(ranks)
        # If the statistics are output Grams, u is refitted in one more pass over the samples.
        needs_refit = (
            bool(statistics and statistics.facts["outputs"]) and self.algorithm != "whiten"
        )
        journal = Journal(folder)
        table: dict[str, Any] = {}
        blocks: Iterable[tuple[str, Block | BlockPair | None]]
        if self.sequential:
            assert build_inputs.samples is not None
            batches = build_inputs.samples.batches(source, device)
            blocks = lock_step(
                source,
                batches,
                layers_by_block,
                journal.file,
                build_inputs.precision,
                device,
                limits,
                folder,
            )
        else:
            samples = build_inputs.samples if needs_refit or statistics is None else None
            blocks = named_blocks(source, samples, list(layers_by_block), device, limits, folder)
        with FactorWriter(journal) as writer:
            for name, block in tracked(blocks, "emulate", len(layers_by_block), "block"):
                if journal.file(name).exists():
                    table |= writer.facts_of(name)
                    continue
                # Passed on at once: no variable keeps the factors in memory while the next block
                # is read.
                table |= writer.write(
                    name,
                    self._factors(source, name, block, layers_by_block[name], build_inputs, device),
                )
                if self.sequential:  # the compressed model reads the file
                    writer.wait()
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in table.items())
        (folder / "layers.json").write_text(f"{{\n{lines}\n}}\n")
        stored = stored_shapes(source, ranks, self.groups(source, ranks))
        facts = size_facts(source, stored, build_inputs.precision)
        return facts | build_inputs.sample_facts

    def _factors(
        self,
        source: Source,
        name: str,
        block: Block | BlockPair | None,
        layers: list[str],
        build_inputs: BuildInputs,
        device: torch.device,
    ) -> dict[str, LayerFactors]:
        """Layer name -> factors, for the layers of one block."""
        ranks, precision = build_inputs.plan, build_inputs.precision
        assert ranks is not None
        groups = self.groups(source, layers)
        if isinstance(block, BlockPair):
            return fit_block(block, groups, ranks, self.algorithm, precision)
        statistics = self._block_statistics(source, name, block, layers, build_inputs)
        weights = weights_of(source, block, layers, device)
        factors = factorize(weights, ranks, statistics, self.algorithm, precision, groups=groups)
        if block is None or statistics is None or self.algorithm == "whiten":
            return factors
        return refine(block, factors, [layer for layer in layers if layer in statistics.outputs])

    def ranks(self, folder: Path) -> Ranks:
        """Return the ranks of the emulator in `folder`."""
        return _ranks(folder)

    def refit(
        self,
        folder: Path,
        source: Source,
        blocks: Iterable[Block],
        ranks: Ranks,
        gradients: Callable[[str], Mapping[str, Tensor]],
        precision: Precision | None,
    ) -> None:
        """Write factors that are fitted anew, to what the loss depends on; see `open`.

        Args:
            folder: of the factors; finished blocks of an interrupted attempt are skipped.
            source: the original model.
            blocks: of the original, with an adapter or without, on the rows to fit to.
            ranks: of the layers; every other layer stays as it is.
            gradients: block name -> gradients of the loss by layer, as `factors.factorize` reads
                them.
            precision: packed format of the factors; None: the model's dtype.
        """
        journal = Journal(folder)
        table: dict[str, Any] = {}
        layers_by_block = by_block(ranks)
        with FactorWriter(journal) as writer:
            for block in blocks:
                layers = layers_by_block[block.name]
                if block.name in journal.lines:
                    table |= writer.facts_of(block.name)
                    continue
                statistics = self._recorded(source, block, layers, precision)
                weights = {name: one.weight for name, one in linears_of(block, layers).items()}
                factors = factorize(
                    *(weights, ranks, statistics, self.algorithm, precision),
                    gradients=gradients(block.name),
                    groups=self.groups(source, layers),
                )
                # Rounding to 16 bits changes v too little to be worth another run of the block.
                if precision is not None and self.algorithm != "whiten":
                    factors = refine(block, factors, [n for n in layers if n in statistics.outputs])
                table |= writer.write(block.name, factors)
                del factors  # else they keep their memory while the next block is read
        write_text(folder / "layers.json", json.dumps(table))

    def _block_statistics(
        self,
        source: Source,
        name: str,
        block: Block | None,
        layers: list[str],
        build_inputs: BuildInputs,
    ) -> Statistics | None:
        """Second moments of a block: read from the cache, or recorded by running the block.

        None for a plain SVD, which needs neither.
        """
        if build_inputs.statistics is not None:
            return Statistics.load(build_inputs.statistics.folder / f"{name}.safetensors")
        if block is None:
            return None
        return self._recorded(source, block, layers, build_inputs.precision)

    def _recorded(
        self, source: Source, block: Block, layers: list[str], precision: Precision | None
    ) -> Statistics:
        """Second moments of a block, recorded by running it."""
        inputs_only = self.statistics_in(precision) == "input"
        joint = self.joint(source, layers)
        return record_moments(block, layers, inputs_only, peek=True, joint=joint)

    def _greedy_ranks(
        self,
        folder: Path,
        source: Source,
        build_inputs: BuildInputs,
        device: torch.device,
        limits: StateLimits,
    ) -> Ranks:
        """Ranks that lose the least energy for the planned parameters, by the original's spectra.

        The spectra are written to `folder`, so that an interrupted build does not repeat them.
        """
        assert build_inputs.plan is not None
        layers_by_block, path = by_block(build_inputs.plan), folder / "spectra.safetensors"
        if not path.exists():
            samples = build_inputs.samples if build_inputs.statistics is None else None
            blocks = named_blocks(source, samples, list(layers_by_block), device, limits, folder)
            layer_spectra: dict[str, Tensor] = {}
            for name, block in tracked(blocks, "spectra", len(layers_by_block), "block"):
                layers = layers_by_block[name]
                statistics = self._block_statistics(source, name, block, layers, build_inputs)
                weights = weights_of(source, block, layers, device)
                layer_spectra |= spectra(weights, statistics, self.groups(source, layers))
            write_safetensors(path, layer_spectra, {})
        plan, groups = build_inputs.plan, self.groups(source, build_inputs.plan)
        shapes = {names[0]: stacked_shape(names, source.linears) for names in groups}
        uniform = {names[0]: plan[names[0]] for names in groups}
        ranks = greedy(load_file(verified_file(path)), shapes, uniform, self.multiple)
        first = first_layers(groups)
        return {layer: ranks[first[layer]] for layer in plan}

    def open(
        self,
        folder: Path,
        source: Source,
        device: torch.device,
        *,
        precision: Precision | None = None,
    ) -> PreTrainedModel:
        """Load the original model, frozen, with its compressed layers replaced by their factors."""
        layers = source.emulated(json.loads((folder / "layers.json").read_text()))
        factorized: dict[str, nn.Module] = {}
        for block, names in by_block(layers).items():
            biases = {name: source.bias(name, device) for name in names}
            path = folder / f"{block}.safetensors"
            factorized |= load_factors(path, biases, device, precision)
        return source.load(device, factorized)

    def residual(
        self,
        folder: Path,
        source: Source,
        layer: str,
        device: torch.device = CPU,
        *,
        precision: Precision | None = None,
    ) -> Tensor | None:
        """Original weight minus the product of its stored factors; None if it is not compressed."""
        if layer not in _ranks(folder):
            return None
        # A missing file is an error; it does not mean that the layer was not compressed.
        path = folder / f"{block_of(layer)}.safetensors"
        factorized = load_factors(path, {layer: None}, device, precision)
        return source.weight(layer, device).double().sub_(factorized[layer].product())


def _ranks(folder: Path) -> Ranks:
    """Ranks of the factorised layers, from `layers.json`."""
    return _read_ranks(folder / "layers.json", (folder / "layers.json").stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _read_ranks(path: Path, modified: int) -> Ranks:
    """Ranks in a `layers.json`, read once and then for every layer from the cache."""
    return {layer: line["rank"] for layer, line in json.loads(path.read_text()).items()}
