"""The memory of calibration does not grow with the number of blocks; measured in a new process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

# Prints the largest increase of the process's memory, for each folder and limit.
PROGRAM = """
import sys
from pathlib import Path
import torch
from emloc.calibration.offload import StateLimits
from emloc.calibration.calibrate import record_moments
from emloc.runtime.memory import HostMemoryPeak, process_bytes
from emloc.models.checkpoint.source import Source
from emloc.calibration.blockwise import by_block, iterate_checkpoint

torch.set_num_threads(1)
torch.manual_seed(0)
batches = [{"input_ids": torch.randint(5, 261, (1, 256))} for _ in range(4)]

def measure(folder, host_bytes):
    source = Source(Path(folder), "deep", "deep", torch.float32)
    layers = by_block(name for name in source.linears if ".layers." in name)
    device = torch.device("cpu")
    limits = StateLimits(host=host_bytes)
    run = iterate_checkpoint(source, batches, list(layers), device, limits=limits)
    with HostMemoryPeak() as peak:
        start = process_bytes()
        for block in run:
            record_moments(block, layers[block.name], inputs_only=False)
    return peak.bytes - start

measure(sys.argv[1], 0)  # what the first use of everything allocates for good
for folder, limit in zip(sys.argv[1::2], sys.argv[2::2]):
    print(measure(folder, int(limit)))
"""


def memory_increases(*runs: tuple[Path, int]) -> list[int]:
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, *(str(item) for pair in runs for item in pair)],
        # One heap, and large blocks are returned at once, so that the measured memory is in use.
        env={**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=True,
    )
    return [int(line) for line in process.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="only there the process tells what is its own")
def test_memory_does_not_depend_on_the_number_of_blocks(tmp_path):
    folders = {}
    for depth in (4, 8):
        shape = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8}
        config = LlamaConfig(vocab_size=len(tiny_tokenizer(True)), num_hidden_layers=depth, **shape)
        folders[depth] = tmp_path / str(depth)
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folders[depth])
    unlimited = 10**9
    shallow, deep, on_disk = memory_increases(
        (folders[4], unlimited), (folders[8], unlimited), (folders[8], 0)
    )
    block = 4 * (4 * 512**2 + 3 * 512 * 1024)
    assert deep > block
    # A block that stays would be a whole one; the heap itself differs by a quarter at times.
    assert deep - shallow < block / 2
    # Two tensors per batch are offloaded: the output of the embedding and of the last block.
    waiting = 2 * 4 * 256 * 512 * 4
    assert deep - on_disk > waiting / 2
