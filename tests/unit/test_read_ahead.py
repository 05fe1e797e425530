"""The next block is read from disk while the passes run through the present one."""

import threading
import time
from pathlib import Path

import pytest
import torch
from tiny import save_checkpoint
from torch import nn

from emloc.calibration.blockwise import iterate_checkpoint
from emloc.calibration.read_ahead import ReadAhead, pinned_block_bytes
from emloc.errors import ConfigError
from emloc.models.checkpoint import pinned
from emloc.models.checkpoint.files import StoredTensor
from emloc.models.checkpoint.source import Source
from emloc.models.checkpoint.weights import SafetensorsWeights

CPU = torch.device("cpu")
NAMES = [f"model.layers.{index}" for index in range(3)]
BATCHES = [{"input_ids": torch.arange(5, 12).reshape(1, 7)}]
THREAD = "read ahead"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("read_ahead"), num_hidden_layers=3)


@pytest.fixture
def source(folder) -> Source:
    return Source(folder, "llama", "llama", torch.float32)


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == THREAD]


@pytest.fixture
def reads(monkeypatch) -> list[tuple[str, str]]:
    """Return the tensors of blocks that are read from files, each with the thread that read it."""
    tensors = []

    def note(method):
        def noting(self, names, *args, **options):
            for name, tensor in method(self, names, *args, **options):
                if ".layers." in name:
                    tensors.append((threading.current_thread().name, name))
                yield name, tensor

        return noting

    for name in ("read", "read_ahead"):
        monkeypatch.setattr(SafetensorsWeights, name, note(getattr(SafetensorsWeights, name)))
    return tensors


def test_a_thread_reads_every_block_once_and_before_its_turn(source, reads):
    for index, block in enumerate(iterate_checkpoint(source, BATCHES, NAMES, CPU)):
        for thread in readers():
            thread.join(timeout=5)
        blocks = {name.removeprefix("model.layers.")[0] for _, name in reads}
        assert blocks == {str(number) for number in range(min(index + 2, 3))}
        block.run(lambda _: None)
    assert {thread for thread, _ in reads} == {THREAD}
    assert len(reads) == len(set(reads)) == 3 * 9
    assert not readers()


def test_the_weights_equal_those_that_are_read_at_once(source):
    expected = source.load(CPU)
    for block in iterate_checkpoint(source, BATCHES, NAMES, CPU):
        for name, parameter in block.module.named_parameters():
            assert torch.equal(parameter, expected.get_parameter(f"{block.name}.{name}"))


def test_stored_tensors_are_cast_to_the_dtype_of_the_model(folder):
    source = Source(folder, "llama", "llama", torch.bfloat16)
    expected = source.load(CPU)
    for block in iterate_checkpoint(source, BATCHES, NAMES, CPU):
        for name, parameter in block.module.named_parameters():
            assert parameter.dtype == torch.bfloat16
            assert torch.equal(parameter, expected.get_parameter(f"{block.name}.{name}"))


def test_another_block_than_the_next_one_is_read_at_once_and_the_next_one_waits(source, reads):
    model = source.skeleton()
    reader = ReadAhead(source, model, CPU)
    reader.start(NAMES[1:])
    reader.fill(NAMES[0])
    reader.start(NAMES[2:])  # does nothing
    reader.fill(NAMES[1])
    assert [name for thread, name in reads if thread == THREAD and NAMES[1] not in name] == []
    assert len(reads) == len(set(reads)) == 2 * 9
    expected = source.load(CPU)
    for name, parameter in model.named_parameters():
        if name.startswith((NAMES[0], NAMES[1])):
            assert torch.equal(parameter, expected.get_parameter(name))
        elif name.startswith(NAMES[2]):
            assert parameter.is_meta
    reader.close()


def test_a_damaged_tensor_fails_at_its_block_in_one_line(folder, monkeypatch, source):
    reads = source.weights.read_ahead
    damaged = "model.layers.1.mlp.up_proj.weight"

    def read(names, *, pinned):
        for name, tensor in reads(names, pinned=pinned):
            yield name, torch.full_like(tensor, torch.nan) if name == damaged else tensor

    monkeypatch.setitem(vars(source.weights), "read_ahead", read)
    blocks = iterate_checkpoint(source, BATCHES, NAMES, CPU)
    next(blocks).run(lambda _: None)
    with pytest.raises(ConfigError, match=rf"{damaged}.* NaN") as error:
        next(blocks)
    assert "\n" not in str(error.value)
    assert not readers()


def test_an_error_of_the_thread_is_met_again_at_its_block(source, monkeypatch):
    def fail(self, names, *args, **options):
        if any(name.startswith(NAMES[1]) for name in names):
            raise ConfigError("shard 2 is not readable; set model.source to another checkpoint")
        return read(self, names, *args, **options)

    read = SafetensorsWeights.read
    monkeypatch.setattr(SafetensorsWeights, "read", fail)
    monkeypatch.setattr(SafetensorsWeights, "read_ahead", lambda *_, **__: fail(None, NAMES))
    blocks = iterate_checkpoint(source, BATCHES, NAMES, CPU)
    assert next(blocks).name == NAMES[0]
    with pytest.raises(ConfigError, match="shard 2 is not readable"):
        next(blocks)


class SlowReader:
    """A reader whose thread is never done by itself."""

    buffers: tuple[str, ...] = ()

    def __init__(self):
        self.tensors = 0

    def read_ahead(self, names, *, pinned):
        while True:
            time.sleep(0.01)
            self.tensors += 1
            yield str(self.tensors), torch.empty(0)


def test_an_ended_pass_ends_the_thread():
    weights, model = SlowReader(), nn.Sequential(nn.Linear(2, 2))
    reader = ReadAhead(weights, model, CPU)
    reader.start(["0"])
    assert len(readers()) == 1
    reader.close()
    assert not readers()
    tensors = weights.tensors
    time.sleep(0.03)
    assert weights.tensors == tensors


def test_pinned_memory_is_that_of_the_largest_block_as_a_power_of_two():
    sizes = {"a.0.w": 65, "a.0.v": 64, "a.1.w": 190, "a.1.empty": 0, "head.weight": 10_000}
    assert pinned_block_bytes(sizes) == 256  # of 192 bytes, aligned
    assert pinned_block_bytes(sizes | {"a.1.v": 1}) == 256
    assert pinned_block_bytes(sizes | {"a.1.v": 65}) == 512
    assert pinned_block_bytes({"head.weight": 10_000}) == 0


@pytest.fixture
def allocated(monkeypatch) -> list[torch.Tensor]:
    """The pinned tensors that were allocated; here each is a mere allocation, without a GPU."""
    pieces, empty = [], torch.empty

    def allocate(*size, pin_memory=False, **options):
        tensor = empty(*size, **options)
        pieces.extend([tensor] if pin_memory else [])
        return tensor

    monkeypatch.setattr(torch, "empty", allocate)
    return pieces


def test_pinned_tensors_are_copies_in_one_piece_of_memory(source, allocated, monkeypatch):
    names = [name for name in source.sizes if name.startswith(NAMES[1])]
    tensors = dict(source.read_ahead(names, pinned=True))
    (memory,) = allocated
    monkeypatch.undo()
    assert tensors.keys() == set(names)
    assert len(memory) == sum(-(-tensor.nbytes // 64) * 64 for tensor in tensors.values())
    for name, tensor in source.read(names):
        assert torch.equal(tensors[name], tensor)
        assert tensors[name].untyped_storage().data_ptr() == memory.data_ptr()
        assert tensor.untyped_storage().data_ptr() != memory.data_ptr()


@pytest.mark.usefixtures("allocated")
def test_pinned_tensors_are_read_in_pieces_and_parts_of_stored_ones_are_copied(source, monkeypatch):
    monkeypatch.setattr(pinned, "_PIECE", 1000)
    stored = {one.name: one for one in source.weights.stored if one.name.startswith(NAMES[1])}
    tensors = dict(source.read([*stored]))
    part = f"{NAMES[1]}.mlp.up_proj.weight"
    whole = {name: one for name, one in stored.items() if name != part}
    copies = dict(pinned.read_pinned(whole, [(part, tensors[part])]))
    assert copies.keys() == tensors.keys() == stored.keys()
    assert all(torch.equal(copies[name], tensor) for name, tensor in tensors.items())


@pytest.mark.usefixtures("allocated")
def test_a_file_that_has_become_shorter_ends_the_read(tmp_path):
    path = tmp_path / "short.safetensors"
    path.write_bytes(bytes(20))
    stored = StoredTensor(path, "weight", "F32", (4,), offset=8)
    with pytest.raises(OSError, match="ends before byte 24"):
        list(pinned.read_pinned({"weight": stored}))
