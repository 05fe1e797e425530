"""Batches of a pass have as many tokens as the device computes at once."""

import pytest
import torch
from tiny import save_checkpoint

from emloc.calibration.batch_size import batch_tokens, group_by_tokens
from emloc.calibration.blockwise import iterate_blocks
from emloc.calibration.calibrate import record_moments
from emloc.calibration.samples import BATCH, Samples
from emloc.data.examples import Example, Examples
from emloc.data.prompts import EncodedExample
from emloc.models.checkpoint.source import Source

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
GIB = 2**30


@pytest.fixture
def memory(monkeypatch):
    """Return a function that sets the free memory of a device of 80 GiB, and its limit."""

    def set_memory(free: int, limit: float = 1.0, reserved: int = 0) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 80 * GIB))
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: limit)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: reserved)

    return set_memory


@pytest.mark.parametrize(
    ("free", "limit", "reserved", "tokens"),
    [
        (79 * GIB, 1.0, 0, 8192),
        (8 * GIB, 1.0, 0, 4096),
        (79 * GIB, 0.1, 0, 4096),  # a process that is limited to 8 GiB
        (79 * GIB, 0.1, 4 * GIB, 2048),
        (79 * GIB, 0.1, 9 * GIB, 512),
    ],
)
def test_a_batch_takes_an_eighth_of_the_memory_that_is_free(memory, free, limit, reserved, tokens):
    memory(free, limit, reserved)
    assert batch_tokens(4096, CUDA) == tokens


def test_a_batch_on_a_cpu_depends_on_nothing_else():
    assert batch_tokens(4096, CPU) == 4096


@pytest.mark.parametrize(
    ("tokens", "least", "groups"),
    [
        (20, 1, [[1, 3, 4], [0, 2]]),
        (8, 1, [[1, 3], [4], [0], [2]]),
        (8, 2, [[1, 3], [4, 0], [2]]),
        (1, 3, [[1, 3, 4], [0, 2]]),
    ],
)
def test_rows_of_similar_lengths_share_a_batch_of_so_many_tokens(tokens, least, groups):
    assert group_by_tokens([6, 2, 9, 3, 5], tokens, least) == groups


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    folder = save_checkpoint(tmp_path_factory.mktemp("sizes"), num_hidden_layers=1)
    return Source(folder, "tiny", "tiny", torch.float32)


@pytest.fixture
def samples() -> Samples:
    texts = ["a", "a longer question of several words", "b c"]
    rows = tuple(Example(str(i), texts[i % 3], f"{i}") for i in range(21))
    return Samples(Examples("rows", rows), None)


def sizes(batches) -> list[int]:
    return [len(batch["input_ids"]) for batch in batches]


def test_calibration_on_a_gpu_has_batches_of_its_size(source, samples, memory):
    memory(79 * GIB)
    assert sizes(samples.batches(source)) == [BATCH, BATCH, 5]
    assert sizes(samples.batches(source, CPU)) == [BATCH, BATCH, 5]
    assert sizes(samples.batches(source, CUDA)) == [21]
    assert sizes(samples.training_batches(source)) == [BATCH, BATCH, 5]


def test_long_rows_keep_the_fewest_rows_of_a_batch(source, samples, memory, monkeypatch):
    monkeypatch.setattr("emloc.calibration.samples.batch_tokens", lambda *_: 1)
    assert sizes(samples.batches(source, CUDA)) == [BATCH, BATCH, 5]


def test_rows_with_images_keep_their_batches(source, samples, memory, monkeypatch):
    memory(79 * GIB)
    with_image = EncodedExample("0", [1, 2], 1, images=("image",))

    class ImageReader:
        def encode(self, example):
            return with_image

        def collate(self, batch, *, answers_only):
            return {"input_ids": torch.zeros(len(batch), 2)}

    monkeypatch.setattr(Source, "reader", lambda _: ImageReader())
    assert sizes(samples.batches(source, CUDA)) == [BATCH, BATCH, 5]


def test_moments_of_larger_batches_differ_by_rounding_alone(source, samples, memory):
    memory(79 * GIB)
    model, layer, moments = source.load(CPU), "model.layers.0.mlp.up_proj", []
    for device in (CPU, CUDA):
        for block in iterate_blocks(
            model, samples.batches(source, device), ["model.layers.0"], CPU
        ):
            statistics = record_moments(block, [layer], inputs_only=True)
            moments.append(statistics.of(layer)["input_gram"])
    torch.testing.assert_close(*moments, rtol=1e-5, atol=1e-6)
