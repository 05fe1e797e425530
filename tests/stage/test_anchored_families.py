"""Anchored emulators of several model families compute the original, adapter included."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import anchored
import families
import pytest
import torch
from anchored import Anchored
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

import emloc
import emloc.anchors.record as record_module
from emloc.anchors.batches import KeyedRow
from emloc.anchors.blocks import Blocks
from emloc.anchors.formats import FORMATS
from emloc.anchors.places import Place
from emloc.anchors.record import Original, Rows, Stretches, record
from emloc.anchors.recorder import OffsetRecorder
from emloc.calibration.blockwise import by_block
from emloc.data.collate import IGNORE
from emloc.models.block_names import find_block
from emloc.models.objectives.tokens import Tokens

CPU = torch.device("cpu")
# Sliding windows, blocks that return tuples, positions that are learnt, experts.
TEXT = ["llama", "gemma2", "falcon", "gpt_neox", "opt", "qwen2_moe"]
# Features of images at the entry of the decoder; in Qwen3-VL also behind its first block.
WITH_IMAGES = ["internvl", "qwen3_vl"]
# Their linear layers are a class of their own, or most parameters are in fused experts.
NOISY = ["falcon", "qwen2_moe"]
ANSWER = 4  # tokens
PLACES = Blocks(places=2, rounds=1, dtype="float32", guard=0)


@dataclass(frozen=True)
class Row:
    """One row of a batch of a family, without its padding."""

    id: str
    inputs: dict[str, Tensor]

    @property
    def length(self) -> int:
        return len(self.inputs["input_ids"])


def rows_of(family: str) -> list[KeyedRow]:
    """Return the rows of `families.batch_of`."""
    batch = families.batch_of(family)
    mask = batch["attention_mask"].bool()
    rows = []
    for index, is_token in enumerate(mask):
        inputs = {
            name: value[index][is_token] if value.shape == mask.shape else images(value, index)
            for name, value in batch.items()
        }
        rows.append(KeyedRow(Row(f"row/{index}", inputs), f"row-{index}"))
    return rows


def images(values: Tensor, index: int) -> Tensor:
    """Return the part of a tensor of images that belongs to one of two rows."""
    return values.chunk(2)[index]


def collate(rows: list[Row], side: str) -> dict[str, Tensor]:
    """Collate rows with padding on one side; their last tokens are the answer."""
    length = max(row.length for row in rows)
    batch: dict[str, Tensor] = {}
    for name, value in rows[0].inputs.items():
        values = [row.inputs[name] for row in rows]
        if value.shape == rows[0].inputs["input_ids"].shape:
            batch[name] = torch.stack([padded(one, length, side, 0) for one in values])
        else:
            batch[name] = torch.cat(values)
    labels = [row.inputs["input_ids"].clone() for row in rows]
    for one in labels:
        one[:-ANSWER] = IGNORE
    batch["labels"] = torch.stack([padded(one, length, side, IGNORE) for one in labels])
    return batch


def padded(tokens: Tensor, length: int, side: str, value: int) -> Tensor:
    """Return tokens (length) with padding on one side."""
    count = length - len(tokens)
    sides = (count, 0) if side == "left" else (0, count)
    return nn.functional.pad(tokens, sides, value=value)


def noisy_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the model with noise on the matrices of its blocks, as quantisation adds."""
    emulator = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in emulator.named_parameters():
        if find_block(name) and parameter.dim() > 1:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.1 * parameter.std() * noise
    return emulator


def with_adapter(model: nn.Module, layers: list[str]) -> nn.Module:
    """Return the model with a LoRA that changes its outputs, the same for equal layers."""
    tuned = get_peft_model(model, LoraConfig(r=2, lora_alpha=2, target_modules=layers)).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(tuned.named_parameters()):
        if ".lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.data = 0.1 * noise
    return tuned.get_base_model()


@dataclass
class Family:
    """A family's model and its emulator with one adapter, and the rows to run them on."""

    original: nn.Module
    emulator: nn.Module
    rows: list[KeyedRow]
    places: list[Place]
    blocks: list[str]
    decoder_blocks: list[str]
    collate: Callable[[list[Row]], dict[str, Tensor]]

    def record(self, folder: Path) -> Anchored:
        """Record the offsets of the rows, each of which is a batch of its own."""
        stored_as = FORMATS["float32"]
        record(
            folder,
            Original(self.original, None),
            Stretches(self.emulator, self.places, stored_as),
            Rows(self.rows, [], self.collate, Tokens(), 1),
            self.blocks,
            self.decoder_blocks,
            device=CPU,
        )
        return Anchored(folder, self.original, self.emulator, self.places, stored_as, self.collate)


def family_of(name: str, side: str) -> Family:
    """Return the models and rows of a family, with padding on one side."""
    model = families.tiny_model(name)
    rows, gather = rows_of(name), partial(collate, side=side)
    batch = gather([keyed.row for keyed in rows])
    del batch["labels"]
    emulator = (
        noisy_copy(model) if name in NOISY else emloc.build_emulator(model, [batch], ratio=0.6)
    )
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and find_block(n)]
    blocks = list(by_block(linears))
    prefix = next(n for n, m in model.named_modules() if m is model.get_decoder())
    decoder_blocks = [block for block in blocks if block.startswith(f"{prefix}.")]
    layers = [layer for layer in linears if layer.startswith(f"{prefix}.")]
    places = PLACES.find(model, decoder_blocks)
    original, emulator = with_adapter(model, layers), with_adapter(emulator, layers)
    return Family(original, emulator, rows, places, blocks, decoder_blocks, gather)


@pytest.mark.parametrize("family", [*TEXT, *WITH_IMAGES])
@pytest.mark.parametrize("side", ["left", "right"])
def test_hidden_states_and_loss_are_the_original_s(tmp_path, family, side):
    models = family_of(family, side)
    pair, rows = models.record(tmp_path), models.rows
    batch = pair.batch(rows)
    with torch.no_grad():
        expected, plain = pair.original(**batch), pair.emulator(**batch)
        plain_states = anchored.states_at(pair.emulator, pair.places, batch)
        with pair.put_back(rows):
            measured = pair.emulator(**batch)
            states = anchored.states_at(pair.emulator, pair.places, batch)
        targets = anchored.states_at(pair.original, pair.places, batch)
    assert len(states) == 2 + (family in WITH_IMAGES)
    for state, target, other in zip(states, targets, plain_states, strict=True):
        torch.testing.assert_close(state, target, rtol=0, atol=1e-5)
        assert (other - target).abs().max() > 1e-2
    mask = batch["attention_mask"].bool()
    torch.testing.assert_close(measured.logits[mask], expected.logits[mask], rtol=0, atol=1e-5)
    assert abs(measured.loss - expected.loss) < 1e-5
    assert abs(plain.loss - expected.loss) > 1e-3


class Killed(BaseException):
    """What ends a pass in a test."""


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Return all offsets in a folder."""
    return {
        f"{path.name}/{name}": tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def kill_behind(models: Family, folder: Path, finished: int, monkeypatch) -> None:
    """Record into a folder until so many blocks of the decoder are finished."""
    real = OffsetRecorder.finish_place_behind

    def finish(self, block):
        real(self, block)
        if block == models.decoder_blocks[finished - 1]:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(OffsetRecorder, "finish_place_behind", finish)
        with pytest.raises(Killed):
            models.record(folder)


# Blocks that return a tensor, blocks that return a tuple, and features of images.
@pytest.mark.parametrize("family", ["llama", "falcon", "qwen3_vl"])
@pytest.mark.parametrize("finished", [1, 2])
@pytest.mark.usefixtures("every_place_marked")
def test_a_killed_pass_resumes_behind_its_last_place(tmp_path, monkeypatch, family, finished):
    """Blocks before this place are not run again, and the offsets are the same to the bit."""
    models = family_of(family, "left")
    models.record(tmp_path / "whole")
    kill_behind(models, tmp_path / "killed", finished, monkeypatch)
    runs = count_runs(models.original, models.decoder_blocks)
    models.record(tmp_path / "killed")
    assert list(runs.values()) == [0] * finished + [len(models.rows)] * (2 - finished)
    whole, resumed = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "killed")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    losses = [
        (tmp_path / name / record_module.LOSSES_FILE).read_text() for name in ("whole", "killed")
    ]
    assert losses[0] == losses[1]
    assert not (tmp_path / "killed" / "states").exists()


def count_runs(model: nn.Module, blocks: list[str]) -> dict[str, int]:
    """Return numbers that count how often the first norm of each block runs from now on."""
    runs = dict.fromkeys(blocks, 0)
    for block in blocks:

        def count(*_, block=block):
            runs[block] += 1

        modules = model.get_submodule(block).modules()
        norm = next(module for module in modules if "Norm" in type(module).__name__)
        norm.register_forward_hook(count)
    return runs


@pytest.mark.parametrize("damage", ["state", "shard"])
@pytest.mark.usefixtures("every_place_marked")
def test_a_pass_with_a_damaged_file_starts_anew(tmp_path, monkeypatch, caplog, damage):
    models = family_of("llama", "left")
    models.record(tmp_path / "whole")
    folder = tmp_path / "killed"
    kill_behind(models, folder, 1, monkeypatch)
    if damage == "state":
        state = next((folder / "states").glob("original-000-*.safetensors"))
        content = bytearray(state.read_bytes())
        content[-1] ^= 1
        state.write_bytes(content)
    else:
        next(folder.glob("place-000-*.safetensors")).unlink()
    runs = count_runs(models.original, models.decoder_blocks)
    models.record(folder)
    assert list(runs.values()) == [len(models.rows)] * 2
    assert "a file of the interrupted pass is damaged" in caplog.text
    whole, again = tensors_of(tmp_path / "whole"), tensors_of(folder)
    assert whole.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
