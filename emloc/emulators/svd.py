"""EMLoC's emulator: every targeted linear as the product of two thin ones."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from emloc.calibrate import Layers
from emloc.emulators import Given, Ranks
from emloc.emulators.factors import Factored, factorize, refine
from emloc.emulators.size import size_facts, uniform_ranks
from emloc.errors import ConfigError
from emloc.nn.factorized import Factorized
from emloc.samples import Samples
from emloc.settings import Compression
from emloc.shard import write_shard
from emloc.source import Source
from emloc.statistics import Statistics
from emloc.walk import Block, block_of, by_block, open_walk

ALGORITHMS = ("eigen", "whiten")


@dataclass(frozen=True, kw_only=True)
class Svd:
    """Rank-k factors that keep the most of each layer's output energy (EMLoC, stage 1)."""

    algorithm: str  # eigen: one eigen-decomposition, no inverse; whiten: the paper's own chain
    aware: bool  # weigh by the calibration activations; false: plain truncated SVD of the weight
    multiple: int  # ranks are rounded down to a multiple of this

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise ConfigError(
                f"emulator.algorithm={self.algorithm}: one of {', '.join(ALGORITHMS)}; "
                "set emulator.algorithm=eigen"
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

    @property
    def statistics(self) -> str | None:
        """The paper's chain needs the input Gram of every layer."""
        if not self.aware:
            return None
        return "input" if self.algorithm == "whiten" else "smaller"

    def build(
        self, folder: Path, source: Source, given: Given, *, device: torch.device
    ) -> dict[str, Any]:
        """Write one file of factors per block; blocks already there are not computed again.

        `layers.json` then holds each layer's rank, energy kept and seconds.
        """
        ranks, statistics = given.ranks, given.statistics
        assert ranks is not None
        blocks = by_block(ranks)
        # Where only outputs were summed, u is solved again in one more pass over the samples.
        again = (
            set(statistics.facts["outputs"]) if statistics and self.algorithm == "eigen" else set()
        )
        table: dict[str, Any] = {}
        for name, block in tqdm(
            _open_blocks(source, blocks, given.samples if again else None, device),
            "emulate",
            total=len(blocks),
            unit="block",
        ):
            path = folder / f"{name}.safetensors"
            if not path.exists():
                found = factorize(
                    {layer: source.weight(layer).to(device) for layer in blocks[name]},
                    ranks,
                    Statistics.load(statistics.folder / path.name) if statistics else None,
                    self.algorithm,
                )
                if block and (late := [layer for layer in blocks[name] if layer in again]):
                    found = refine(block, found, late)
                _save(found, path)
            table |= _facts(path)
        (folder / "layers.json").write_text(json.dumps(table, indent=1))
        return size_facts(source, ranks)

    def open(self, folder: Path, source: Source, device: torch.device) -> PreTrainedModel:
        """The original with its compressed layers replaced by their factors."""
        layers = json.loads((folder / "layers.json").read_text())
        replace = {}
        for block, members in by_block(layers).items():
            factors = load_file(folder / f"{block}.safetensors", device=str(device))
            for layer in members:
                u, v = factors[f"{layer}.u"], factors[f"{layer}.v"]
                replace[layer] = Factorized(u, v, source.bias(layer, device))
        return source.load(device, replace)

    def residual(self, folder: Path, source: Source, layer: str) -> Tensor | None:
        """Original minus the product of the factors, as both are stored."""
        path = folder / f"{block_of(layer)}.safetensors"
        if not path.exists():
            return None
        with safe_open(path, framework="pt") as file:
            if f"{layer}.u" not in file.keys():  # noqa: SIM118 - the file is no mapping
                return None
            u, v = file.get_tensor(f"{layer}.u"), file.get_tensor(f"{layer}.v")
        return source.weight(layer).double() - u.double() @ v.double()


def _open_blocks(
    source: Source, blocks: Iterable[str], samples: Samples | None, device: torch.device
) -> Iterator[tuple[str, Block | None]]:
    """Block names in order; with samples also the blocks, about to be run over them."""
    if samples is None:
        yield from ((name, None) for name in blocks)
    else:
        for block in open_walk(source, samples.batches(source), list(blocks), device):
            yield block.name, block


def _save(found: dict[str, Factored], path: Path) -> None:
    tensors = {
        f"{layer}.{part}": getattr(one.factors, part)
        for layer, one in found.items()
        for part in ("u", "v")
    }
    write_shard(path, tensors, {layer: json.dumps(one.facts) for layer, one in found.items()})


def _facts(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return {layer: json.loads(facts) for layer, facts in file.metadata().items()}
