"""EMLoC's emulator: every targeted linear as the product of two thin ones."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from emloc.calibration.blockwise import Block, block_of, by_block
from emloc.calibration.calibrate import Layers, record_moments
from emloc.calibration.moments import Statistics
from emloc.calibration.named_blocks import named_blocks, weights_of
from emloc.config.settings import Compression
from emloc.emulators import BuildInputs, Emulator, Ranks
from emloc.emulators.size import factors_of, size_facts, uniform_ranks
from emloc.emulators.svd.factor_file import facts_of, load_factors, save_factors
from emloc.emulators.svd.factors import LayerFactors, factorize, refine, spectra
from emloc.emulators.svd.sequential import BlockPair, fit, lock_step
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import CPU, Source
from emloc.precision import Precision
from emloc.runtime.journal import Journal
from emloc.runtime.keys import neutral
from emloc.runtime.manifest import whole
from emloc.runtime.progress import tracked
from emloc.runtime.safetensors_file import write_shard
from emloc.tensors.linalg.allocate import greedy

ALGORITHMS = ("subspace", "eigen", "whiten")
ALLOCATIONS = ("uniform", "greedy")


@dataclass(frozen=True, kw_only=True)
class Svd(Emulator):
    """Rank-k factors that keep the most of each layer's output energy (EMLoC, stage 1)."""

    algorithm: str  # subspace: products only; eigen: one decomposition; whiten: the paper's chain
    aware: bool  # weigh by the calibration activations; false: plain truncated SVD of the weight
    multiple: int  # ranks are rounded down to a multiple of this
    sequential: bool = neutral(False)  # fit each layer to what those compressed before it give
    allocation: str = neutral("uniform")  # greedy: more of the layers that would lose the most

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise ConfigError(
                f"emulator.algorithm={self.algorithm}: one of {', '.join(ALGORITHMS)}; "
                "set emulator.algorithm=subspace"
            )
        if self.algorithm == "whiten" and not self.aware:
            raise ConfigError(
                "emulator.aware=false leaves nothing to whiten; set emulator.algorithm=eigen"
            )
        if self.allocation not in ALLOCATIONS:
            raise ConfigError(
                f"emulator.allocation={self.allocation}: one of {', '.join(ALLOCATIONS)}; "
                "set emulator.allocation=uniform"
            )
        if self.sequential and not self.aware:
            raise ConfigError(
                "emulator.sequential=true fits to activations, which emulator.aware=false leaves "
                "out; set emulator.sequential=false"
            )
        if self.sequential and self.algorithm == "whiten":
            raise ConfigError(
                "emulator.sequential=true is no part of the paper's chain; "
                "set emulator.algorithm=eigen, or emulator.sequential=false"
            )
        if self.multiple < 1:
            raise ConfigError(
                f"emulator.multiple must be at least 1, got {self.multiple}; "
                "set emulator.multiple=1"
            )

    def plan(self, source: Source, layers: Layers, budget: Compression) -> Ranks:
        """The same share of every layer: greedy ranks, found in building, take no more in all."""
        return uniform_ranks(source, layers, budget, self.multiple)

    keeps_weights = False

    @property
    def samples(self) -> bool:
        """Not for a plain SVD."""
        return self.aware

    @property
    def statistics(self) -> str | None:
        """The paper's chain needs the input Gram of every layer; block after block takes its own.

        Greedy ranks are of the original's.
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
        host_bytes: int | None = None,
    ) -> dict[str, Any]:
        """Write one file of factors per block; blocks already there are not computed again.

        One block's weights are in memory at a time, in both models where it is `sequential`.
        Without statistics they are taken on the way, block by block, and not kept.
        `journal.jsonl` gets a line for every block that is done; `layers.json` in the end holds
        each layer's rank, energy kept, seconds and some of its spectrum, a layer a line;
        `spectra.safetensors`, what greedy ranks are chosen by.
        """
        if self.allocation == "greedy":
            build_inputs = replace(
                build_inputs, plan=self._greedy(folder, source, build_inputs, device, host_bytes)
            )
        ranks, statistics = build_inputs.plan, build_inputs.statistics
        assert ranks is not None
        blocks = by_block(ranks)
        # Where only outputs were summed, u is solved again in one more pass over the samples.
        again = bool(statistics and statistics.facts["outputs"]) and self.algorithm != "whiten"
        journal = Journal(folder)
        table: dict[str, Any] = {}
        run: Iterable[tuple[str, Block | BlockPair | None]]
        if self.sequential:
            assert build_inputs.samples is not None
            batches = build_inputs.samples.batches(source)
            run = lock_step(
                source,
                batches,
                blocks,
                journal.file,
                build_inputs.precision,
                device,
                host_bytes,
                folder,
            )
        else:
            samples = build_inputs.samples if again or statistics is None else None
            run = named_blocks(source, samples, list(blocks), device, host_bytes, folder)
        for name, block in tracked(run, "emulate", len(blocks), "block"):
            path = journal.file(name)
            if not path.exists():
                # Nothing of it is held but the file, when the next block is read.
                save_factors(
                    self._factors(source, name, block, blocks[name], build_inputs, device), path
                )
            found = facts_of(path)
            if name not in journal.lines:
                seconds = round(sum(layer["seconds"] for layer in found.values()), 4)
                journal.add(name, layers=list(found), seconds=seconds)
            table |= found
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(one)}" for name, one in table.items())
        (folder / "layers.json").write_text(f"{{\n{lines}\n}}\n")
        facts = size_facts(source, factors_of(source, ranks), build_inputs.precision)
        return facts | ({"samples": build_inputs.samples.ids} if build_inputs.samples else {})

    def _factors(
        self,
        source: Source,
        name: str,
        block: Block | BlockPair | None,
        layers: list[str],
        build_inputs: BuildInputs,
        device: torch.device,
    ) -> dict[str, LayerFactors]:
        assert build_inputs.plan is not None
        if isinstance(block, BlockPair):
            return fit(block, layers, build_inputs.plan, self.algorithm, build_inputs.precision)
        known = self._known(name, block, layers, build_inputs)
        weights = weights_of(source, block, layers, device)
        found = factorize(weights, build_inputs.plan, known, self.algorithm, build_inputs.precision)
        if block is None or known is None:
            return found
        again = [layer for layer in layers if layer in known.outputs]
        return refine(block, found, again) if self.algorithm != "whiten" else found

    def _known(
        self, name: str, block: Block | None, layers: list[str], build_inputs: BuildInputs
    ) -> Statistics | None:
        """Second moments of the block: written ones, or those it gives when it is looked at."""
        if build_inputs.statistics is not None:
            return Statistics.load(build_inputs.statistics.folder / f"{name}.safetensors")
        if block is None:
            return None
        return record_moments(block, layers, self.statistics == "input", stay=True)

    def _greedy(
        self,
        folder: Path,
        source: Source,
        build_inputs: BuildInputs,
        device: torch.device,
        host_bytes: int | None,
    ) -> Ranks:
        """The ranks that lose the least for the parameters planned, by the original's spectra."""
        assert build_inputs.plan is not None
        blocks, path = by_block(build_inputs.plan), folder / "spectra.safetensors"
        if not path.exists():
            samples = build_inputs.samples if build_inputs.statistics is None else None
            run = named_blocks(source, samples, list(blocks), device, host_bytes, folder)
            found: dict[str, Tensor] = {}
            for name, block in tracked(run, "spectra", len(blocks), "block"):
                known = self._known(name, block, blocks[name], build_inputs)
                found |= spectra(weights_of(source, block, blocks[name], device), known)
            write_shard(path, found, {})
        shapes = {layer: source.linears[layer] for layer in build_inputs.plan}
        return greedy(load_file(whole(path)), shapes, build_inputs.plan, self.multiple)

    def open(
        self,
        folder: Path,
        source: Source,
        device: torch.device,
        *,
        precision: Precision | None = None,
    ) -> PreTrainedModel:
        """The original with its compressed layers replaced by their factors."""
        layers = json.loads((folder / "layers.json").read_text())
        replace: dict[str, nn.Module] = {}
        for block, members in by_block(layers).items():
            biases = {layer: source.bias(layer, device) for layer in members}
            path = folder / f"{block}.safetensors"
            replace |= load_factors(path, biases, device, precision)
        return source.load(device, replace)

    def residual(
        self,
        folder: Path,
        source: Source,
        layer: str,
        device: torch.device = CPU,
        *,
        precision: Precision | None = None,
    ) -> Tensor | None:
        """Original minus the product of the factors, as both are stored."""
        if layer not in _ranks(folder):
            return None
        # The file has to be there: a lost one does not mean that the layer is as it was.
        path = folder / f"{block_of(layer)}.safetensors"
        found = load_factors(path, {layer: None}, device, precision)
        return source.weight(layer, device).double().sub_(found[layer].product())


def _ranks(folder: Path) -> Ranks:
    """The layers that were factorised, whichever files are there."""
    return _ranks_in(folder / "layers.json", (folder / "layers.json").stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _ranks_in(path: Path, modified: int) -> Ranks:
    """Read once: a recovery asks for every layer, and the table holds much more than ranks."""
    return {layer: line["rank"] for layer, line in json.loads(path.read_text()).items()}
