"""Padding changes nothing in what OPT's blocks give, which flatten the tokens before their MLP."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from families import tiny_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

import emloc
from emloc.calibration.block_order import next_block, ordered_blocks
from emloc.calibration.blockwise import by_block, iterate_blocks, iterate_checkpoint
from emloc.config.settings import Compression
from emloc.emulators import BuildInputs
from emloc.emulators.full import block_linears
from emloc.emulators.layer_drop import IdentityBlock
from emloc.emulators.prune.unit_scores import importance
from emloc.emulators.prune.units import units_of
from emloc.emulators.svd import Svd
from emloc.models.checkpoint.source import Source
from emloc.recovery.correction import moments_by_layer
from emloc.tensors.linalg.correct import LoraPair

CPU = torch.device("cpu")
LENGTHS = [7, 3, 12, 5, 9, 12, 31, 4]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    folder = tmp_path_factory.mktemp("opt")
    tiny_model("opt").save_pretrained(folder)
    return Source(folder, "opt", "opt", torch.float32)


@dataclass(frozen=True)
class Rows:
    """The same rows in batches of `size`, padded on the left; a batch of one has no padding."""

    size: int
    ids = ("train/1",)

    def batches(self, source, device=None) -> list[dict[str, Tensor]]:
        draw = torch.Generator().manual_seed(0)
        rows = [torch.randint(5, 200, (length,), generator=draw) for length in LENGTHS]
        batches = []
        for start in range(0, len(rows), self.size):
            some = rows[start : start + self.size]
            longest = max(map(len, some))
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in some])
            ids = torch.full(mask.shape, 201)
            ids[mask.bool()] = torch.cat(some)
            batches.append({"input_ids": ids, "attention_mask": mask})
        return batches

    def labelled(self) -> list[dict[str, Tensor]]:
        batches = self.batches(None)
        for batch in batches:
            batch["labels"] = batch["input_ids"].where(batch["attention_mask"].bool(), -100)
            batch["labels"][:, :-3] = -100
        return batches


def close(ours: Tensor, exact: Tensor) -> None:
    """Compare up to the rounding of float32 in another order of the sums."""
    torch.testing.assert_close(ours, exact, rtol=0, atol=2e-4 * float(exact.abs().max()))


def products(folder: Path, source: Source, rows: Rows, emulator: Svd) -> dict[str, Tensor]:
    """Build an emulator from the rows, and return layer -> the product of its factors."""
    folder.mkdir()
    layers = {name: source.linears[name] for name in block_linears(source)}
    plan = emulator.plan(source, layers, Compression(0.5, "linears", 16))
    emulator.build(folder, source, BuildInputs(plan, None, rows, None), device=CPU)
    weights = {}
    for file in folder.glob("*layers*.safetensors"):
        factors = load_file(file)
        for name in {key.rpartition(".")[0] for key in factors}:
            weights[name] = factors[f"{name}.u"] @ factors[f"{name}.v"]
    assert len(weights) == len(layers) == 12
    return weights


@pytest.mark.parametrize(
    "settings",
    [
        {"algorithm": "subspace"},
        {"algorithm": "eigen", "allocation": "greedy"},
        {"algorithm": "whiten"},
        {"algorithm": "eigen", "sequential": True},
    ],
    ids=["subspace", "greedy", "whiten", "sequential"],
)
def test_the_factors_are_those_of_samples_without_padding(source, tmp_path, settings):
    emulator = Svd(**({"aware": True, "multiple": 1} | settings))
    padded = products(tmp_path / "padded", source, Rows(4), emulator)
    alone = products(tmp_path / "alone", source, Rows(1), emulator)
    for name, weight in alone.items():
        close(padded[name], weight)


def test_the_moments_of_the_correction_are_those_of_samples_without_padding(source):
    pairs = {
        name: LoraPair(torch.randn(2, shape[1]), torch.randn(shape[0], 2), 1.0)
        for name, shape in source.linears.items()
        if ".layers." in name
    }
    padded, alone = (
        moments_by_layer(
            iterate_checkpoint(source, Rows(size).batches(source), list(by_block(pairs)), CPU),
            pairs,
        )
        for size in (4, 1)
    )
    for name, moments in alone.items():
        assert padded[name].tokens == moments.tokens == sum(LENGTHS)
        close(padded[name].aca, moments.aca)
        close(padded[name].ca, moments.ca)


@pytest.mark.parametrize("kind", ["upop", "taylor"])
def test_the_scores_of_units_are_those_of_samples_without_padding(source, kind):
    """Gradients at padding are zero. One batch: magnitudes of gradients are summed over batches."""
    units = units_of(source, block_linears(source), 0, 0)
    assert {group.count for group in units.values()} == {48}
    whole = Rows(len(LENGTHS)).labelled()
    longer = [
        {
            name: torch.nn.functional.pad(values, (6, 0), value={"labels": -100}.get(name, 0))
            for name, values in batch.items()
        }
        for batch in whole
    ]
    scores = [
        importance(source.load(CPU), batches, units, kind, source.objective)
        for batches in (whole, longer)
    ]
    for name, values in scores[0].items():
        close(scores[1][name], values)


def test_the_library_leaves_padding_out(source):
    model = source.load(CPU)
    padded, alone = (
        emloc.build_emulator(model, Rows(size).batches(None), ratio=0.5) for size in (4, 1)
    )
    for name in block_linears(source):
        close(padded.get_submodule(name).product(), alone.get_submodule(name).product())


# The order of blocks ------------------------------------------------------------------------------


class TowerLast(PreTrainedModel):
    """A model that keeps its tower behind its decoder, and runs the tower first."""

    config_class = LlamaConfig

    def __init__(self) -> None:
        super().__init__(LlamaConfig())
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))
        self.tower = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))
        self.merge = torch.nn.ModuleList([torch.nn.Linear(4, 4)])

    def get_decoder(self) -> torch.nn.Module:
        return self.layers

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        for block in (self.tower[0], self.merge[0], self.tower[1], *self.layers):
            x = block(x)
        return x


def test_blocks_run_in_the_order_of_computation():
    model = TowerLast()
    batches = [{"x": torch.randn(1, 2, 4), "attention_mask": torch.ones(1, 2)} for _ in range(3)]
    names = ["layers.0", "layers.1", "tower.0", "tower.1", "merge.0"]
    calls = []
    for block in iterate_blocks(model, batches, names, CPU):
        block.run(lambda _, name=block.name: calls.append(name))
    expected = ["tower.0", "merge.0", "tower.1", "layers.0", "layers.1"]
    assert calls == [name for name in expected for _ in batches]


def test_the_blocks_of_a_decoder_come_last():
    model = TowerLast()
    modules = {"layers.0": model.layers[0], "tower.0": model.tower[0]}
    assert list(ordered_blocks(modules, model.layers)) == ["tower.0", "layers.0"]


@pytest.mark.parametrize(
    ("reached", "block"),
    [
        ({"v.blocks.1", "t.layers.0"}, "v.blocks.1"),
        ({"v.merge.0", "t.layers.0"}, "v.merge.0"),
        ({"t.layers.0"}, "v.blocks.1"),  # no batch has an image
        (set(), "v.blocks.1"),
    ],
)
def test_the_next_block_is_one_that_a_pass_has_reached(reached, block):
    assert next_block(["v.blocks.1", "v.merge.0", "t.layers.0"], reached) == block


# Dropped blocks -----------------------------------------------------------------------------------


class Block(torch.nn.Module):
    """A block that returns the hidden states, or a tuple that begins with them."""

    def __init__(self, size: int | None) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor | None, ...]:
        return x if self.size is None else (x, *[None] * (self.size - 1))


@pytest.mark.parametrize("size", [None, 1, 3])
def test_a_dropped_block_returns_what_the_other_blocks_return(size):
    x, block, dropped = torch.ones(2, 3, 4), Block(size), IdentityBlock(None)
    dropped.follow(block)
    block(x)
    expected = x if size is None else (x, *[None] * (size - 1))
    assert dropped(x, use_cache=False) == expected if size else dropped(x) is x
