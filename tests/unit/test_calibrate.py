"""A killed calibration resumes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_checkpoint
from torch import Tensor

from emloc.calibration.calibrate import calibrate
from emloc.calibration.offload import StateLimits
from emloc.calibration.samples import Samples
from emloc.data.examples import Example, Examples
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import Source

CPU = torch.device("cpu")
BLOCKS = [f"model.layers.{i}" for i in range(3)]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    folder = save_checkpoint(tmp_path_factory.mktemp("llama"), num_hidden_layers=3)
    return Source(folder, "llama", "llama", torch.float32)


def samples() -> Samples:
    rows = [Example(str(i), f"{i} + {i}? " * (i + 1), f"{2 * i}") for i in range(10)]
    return Samples(Examples("sums", tuple(rows)), 512)


def moments(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {name: load_file(folder / f"{name}.safetensors") for name in BLOCKS}


def journal(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


def run(source: Source, folder: Path, **live) -> dict:
    folder.mkdir(exist_ok=True)
    layers = {name: shape for name, shape in source.linears.items() if ".layers." in name}
    return calibrate(folder, source, layers, samples(), False, device=CPU, **live)


def same(ours: dict, theirs: dict) -> None:
    for block in BLOCKS:
        assert ours[block].keys() == theirs[block].keys()
        assert all(torch.equal(ours[block][name], one) for name, one in theirs[block].items())


@pytest.mark.parametrize("block", [0, 2])
def test_a_block_whose_activations_overflow_is_named(tmp_path, block):
    folder = save_checkpoint(tmp_path / "llama", num_hidden_layers=3)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"model.layers.{block}.mlp.up_proj.weight"].fill_(1e38)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError) as caught:
        run(Source(folder, "llama", "llama", torch.float32), tmp_path / "statistics")
    assert str(caught.value) == (
        f"calibration: the inputs or outputs of model.layers.{block}.mlp.down_proj in block "
        f"model.layers.{block} have NaN or infinite values; set model.dtype=bfloat16 or float32, "
        "or model.source to another checkpoint"
    )


def test_the_journal_has_one_line_per_block(source, tmp_path):
    facts = run(source, tmp_path)
    lines = journal(tmp_path)
    assert [line["block"] for line in lines] == BLOCKS
    assert {line["tokens"] for line in lines} == {facts["tokens"]}
    assert [line["outputs"] for line in lines] == [[f"{name}.mlp.down_proj"] for name in BLOCKS]
    assert facts["outputs"] == [f"{name}.mlp.down_proj" for name in BLOCKS]
    for line in lines:
        assert line["bytes"] == (tmp_path / f"{line['block']}.safetensors").stat().st_size
        assert line["seconds"] > 0


def test_a_killed_calibration_resumes_with_the_next_block(source, tmp_path):
    """Killed after the second file and before its line; finished blocks are not computed again."""
    whole = run(source, tmp_path / "whole")
    expected = moments(tmp_path / "whole")
    broken = tmp_path / "broken"
    run(source, broken)
    first = (broken / f"{BLOCKS[0]}.safetensors").stat()
    lines = (broken / "journal.jsonl").read_text().splitlines(keepends=True)
    (broken / "journal.jsonl").write_text(lines[0] + lines[1][:20])
    (broken / f"{BLOCKS[2]}.safetensors").unlink()
    assert run(source, broken) == whole
    same(moments(broken), expected)
    assert [line["block"] for line in journal(broken)] == BLOCKS
    assert journal(broken)[0] == json.loads(lines[0])
    assert (broken / f"{BLOCKS[0]}.safetensors").stat().st_mtime_ns == first.st_mtime_ns


def test_offloading_hidden_states_changes_no_result(source, tmp_path):
    run(source, tmp_path / "memory")
    run(source, tmp_path / "disk", limits=StateLimits(host=0))
    same(moments(tmp_path / "disk"), moments(tmp_path / "memory"))
    assert {path.suffix for path in (tmp_path / "disk").iterdir()} == {".safetensors", ".jsonl"}
