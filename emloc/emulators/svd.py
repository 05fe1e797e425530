"""EMLoC's emulator: every targeted linear as the product of two thin ones."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from emloc.calibrate import Layers, linears_of, observe
from emloc.emulators import Emulator, Given, Ranks
from emloc.emulators.factors import Factored, factorize, refine
from emloc.emulators.size import factors_of, size_facts, uniform_ranks
from emloc.emulators.stored import facts_of, load_factors, save_factors
from emloc.errors import ConfigError
from emloc.journal import Journal
from emloc.settings import Compression
from emloc.source import CPU, Source
from emloc.statistics import Statistics
from emloc.walk import Block, block_of, by_block, open_walk

ALGORITHMS = ("subspace", "eigen", "whiten")


@dataclass(frozen=True, kw_only=True)
class Svd(Emulator):
    """Rank-k factors that keep the most of each layer's output energy (EMLoC, stage 1)."""

    algorithm: str  # subspace: products only; eigen: one decomposition; whiten: the paper's chain
    aware: bool  # weigh by the calibration activations; false: plain truncated SVD of the weight
    multiple: int  # ranks are rounded down to a multiple of this

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
        if self.multiple < 1:
            raise ConfigError(
                f"emulator.multiple must be at least 1, got {self.multiple}; "
                "set emulator.multiple=1"
            )

    def plan(self, source: Source, layers: Layers, budget: Compression) -> Ranks:
        """The same share of every layer."""
        return uniform_ranks(source, layers, budget, self.multiple)

    keeps_weights = False

    @property
    def samples(self) -> bool:
        """Not for a plain SVD."""
        return self.aware

    @property
    def statistics(self) -> str | None:
        """The paper's chain needs the input Gram of every layer."""
        if not self.aware:
            return None
        return "input" if self.algorithm == "whiten" else "smaller"

    def build(
        self,
        folder: Path,
        source: Source,
        given: Given,
        *,
        device: torch.device,
        host_bytes: int | None = None,
    ) -> dict[str, Any]:
        """Write one file of factors per block; blocks already there are not computed again.

        One block's weights are in memory at a time. Without statistics they are taken on the way,
        block by block, and not kept. `journal.jsonl` gets a line for every block that is done;
        `layers.json` in the end holds each layer's rank, energy kept and seconds.
        """
        ranks, statistics = given.plan, given.statistics
        assert ranks is not None
        blocks = by_block(ranks)
        # Where only outputs were summed, u is solved again in one more pass over the samples.
        again = bool(statistics and statistics.facts["outputs"]) and self.algorithm != "whiten"
        journal = Journal(folder)
        table: dict[str, Any] = {}
        run: Iterable[tuple[str, Block | None]] = ((name, None) for name in blocks)
        if given.samples is not None and (again or statistics is None):
            batches = given.samples.batches(source)
            walked = open_walk(
                source, batches, list(blocks), device, host_bytes=host_bytes, folder=folder
            )
            run = ((block.name, block) for block in walked)
        for name, block in tqdm(run, "emulate", total=len(blocks), unit="block"):
            path = journal.file(name)
            if not path.exists():
                known = Statistics.load(statistics.folder / path.name) if statistics else None
                # Nothing of it is held but the file, when the next block is read.
                save_factors(self._factors(source, block, blocks[name], given, known, device), path)
            found = facts_of(path)
            if name not in journal.lines:
                seconds = round(sum(layer["seconds"] for layer in found.values()), 4)
                journal.add(name, layers=list(found), seconds=seconds)
            table |= found
        (folder / "layers.json").write_text(json.dumps(table, indent=1))
        facts = size_facts(source, factors_of(source, ranks), given.bits)
        return facts | ({"samples": given.samples.ids} if given.samples else {})

    def _factors(
        self,
        source: Source,
        block: Block | None,
        layers: list[str],
        given: Given,
        known: Statistics | None,
        device: torch.device,
    ) -> dict[str, Factored]:
        assert given.plan is not None
        if block is not None and known is None:
            known = observe(block, layers, self.statistics == "input", stay=True)
        weights = _weights(source, block, layers, device)
        found = factorize(weights, given.plan, known, self.algorithm, given.bits)
        if block is None or known is None:
            return found
        again = [layer for layer in layers if layer in known.outputs]
        return refine(block, found, again) if self.algorithm != "whiten" else found

    def open(self, folder: Path, source: Source, device: torch.device) -> PreTrainedModel:
        """The original with its compressed layers replaced by their factors."""
        layers = json.loads((folder / "layers.json").read_text())
        replace: dict[str, nn.Module] = {}
        for block, members in by_block(layers).items():
            biases = {layer: source.bias(layer, device) for layer in members}
            replace |= load_factors(folder / f"{block}.safetensors", biases, device)
        return source.load(device, replace)

    def residual(
        self, folder: Path, source: Source, layer: str, device: torch.device = CPU
    ) -> Tensor | None:
        """Original minus the product of the factors, as both are stored."""
        if layer not in json.loads((folder / "layers.json").read_text()):
            return None
        path = folder / f"{block_of(layer)}.safetensors"
        found = load_factors(path, {layer: None}, device)
        return source.weight(layer, device).double().sub_(found[layer].product())


def _weights(
    source: Source, block: Block | None, layers: Iterable[str], device: torch.device
) -> dict[str, Tensor]:
    """The block's weights: those of the block about to be run, where there is one."""
    if block is not None:
        return {layer: one.weight for layer, one in linears_of(block, layers).items()}
    return {layer: source.weight(layer, device) for layer in layers}
