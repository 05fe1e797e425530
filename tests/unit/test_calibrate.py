"""Calibration goes on where it was killed, and takes no more memory for a deeper model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_checkpoint, tiny_tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from emloc.calibrate import calibrate
from emloc.examples import Example, Examples
from emloc.samples import Samples
from emloc.source import Source

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


def test_a_line_is_written_for_each_block(source, tmp_path):
    facts = run(source, tmp_path)
    lines = journal(tmp_path)
    assert [line["block"] for line in lines] == BLOCKS
    assert {line["tokens"] for line in lines} == {facts["tokens"]}
    assert [line["outputs"] for line in lines] == [[f"{name}.mlp.down_proj"] for name in BLOCKS]
    assert facts["outputs"] == [f"{name}.mlp.down_proj" for name in BLOCKS]
    for line in lines:
        assert line["bytes"] == (tmp_path / f"{line['block']}.safetensors").stat().st_size
        assert line["seconds"] > 0


def test_a_killed_calibration_goes_on_with_the_next_block(source, tmp_path):
    """Killed behind the second file and in front of its line; what is done is not summed again."""
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


def test_where_hidden_states_wait_changes_nothing(source, tmp_path):
    run(source, tmp_path / "memory")
    run(source, tmp_path / "disk", host_bytes=0)
    same(moments(tmp_path / "disk"), moments(tmp_path / "memory"))
    assert {path.suffix for path in (tmp_path / "disk").iterdir()} == {".safetensors", ".jsonl"}


# Memory ------------------------------------------------------------------------------------------

# Prints by how much the process's own memory rises at most, for each folder and limit.
PROGRAM = """
import sys
from pathlib import Path
import torch
from emloc.calibrate import observe
from emloc.memory import Peak, process_bytes
from emloc.source import Source
from emloc.walk import by_block, open_walk

torch.set_num_threads(1)
torch.manual_seed(0)
batches = [{"input_ids": torch.randint(5, 261, (1, 256))} for _ in range(4)]

def measure(folder, host_bytes):
    source = Source(Path(folder), "deep", "deep", torch.float32)
    layers = by_block(name for name in source.linears if ".layers." in name)
    run = open_walk(source, batches, list(layers), torch.device("cpu"), host_bytes=host_bytes)
    with Peak() as peak:
        start = process_bytes()
        for block in run:
            observe(block, layers[block.name], whole=False)
    return peak.bytes - start

measure(sys.argv[1], 0)  # what the first use of everything allocates for good
for folder, limit in zip(sys.argv[1::2], sys.argv[2::2]):
    print(measure(folder, int(limit)))
"""


def risen(*runs: tuple[Path, int]) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *(str(item) for pair in runs for item in pair)],
        # One heap, and large pieces given back at once: what is measured is what is in use.
        env={**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=True,
    )
    return [int(line) for line in done.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="only there the process tells what is its own")
def test_memory_is_that_of_one_block_however_many_there_are(tmp_path):
    folders = {}
    for depth in (4, 8):
        shape = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8}
        config = LlamaConfig(vocab_size=len(tiny_tokenizer(True)), num_hidden_layers=depth, **shape)
        folders[depth] = tmp_path / str(depth)
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folders[depth])
    unlimited = 10**9
    shallow, deep, on_disk = risen(
        (folders[4], unlimited), (folders[8], unlimited), (folders[8], 0)
    )
    block = 4 * (4 * 512**2 + 3 * 512 * 1024)
    assert deep > block
    assert deep - shallow < block / 4
    # Two tensors of each batch wait: what the embedding gave, and what the last block did.
    waiting = 2 * 4 * 256 * 512 * 4
    assert deep - on_disk > waiting / 2
