"""Tensors of suspended passes are offloaded and restored unchanged."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch import nn
from walked import (
    MODELS,
    PoolOfDevice,
    SpoilingPool,
    batches_of,
    model_and_blocks,
    record_block_tensors,
)

from emloc.calibration.blockwise import iterate_blocks
from emloc.calibration.offload import (
    UNLIMITED,
    OffloadedTensors,
    OffloadPool,
    StateLimits,
    tensors_in,
)
from emloc.errors import ConfigError

CPU = torch.device("cpu")


def mapped(folder: Path) -> int:
    """Return the number of unnamed files in `folder` that this process has mapped to memory."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum(str(folder) in line and line.endswith("(deleted)") for line in lines)


def pool_of(folder: Path, limit: int | None, model: nn.Module | None = None) -> OffloadPool:
    return OffloadPool(model or nn.Identity(), CPU, StateLimits(host=limit), folder)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


# One pass ----------------------------------------------------------------------------------------


def test_tensors_above_the_limit_are_written_to_unnamed_files(tmp_path):
    pool = pool_of(tmp_path, 500)
    small, large = torch.arange(100.0), torch.arange(300.0)
    where = small.data_ptr()
    OffloadedTensors(pool).offload([small, large])
    assert (pool.memory, pool.disk) == (400, 1200)
    assert small.data_ptr() == where
    assert mapped(tmp_path) == 1
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(large, torch.arange(300.0))


def test_without_a_limit_a_cpu_offloads_nothing(tmp_path):
    assert pool_of(tmp_path, None).is_idle
    assert not pool_of(tmp_path, 10**12).is_idle


def test_passes_stay_on_the_device_while_there_is_room(tmp_path):
    limits = StateLimits(device=1000, host=0)
    pool = PoolOfDevice(nn.Identity(), CPU, limits, tmp_path)
    tensors = [torch.arange(100.0) for _ in range(3)]
    passes = [OffloadedTensors(pool) for _ in tensors]
    for one, tensor in zip(passes, tensors, strict=True):
        one.offload([tensor])
    assert (pool.kept, pool.disk) == (800, 400)  # the third found no room
    passes[0].restore()
    assert (pool.kept, pool.disk) == (400, 400)
    passes[0].offload([tensors[0], torch.zeros(200)])  # has grown, and fits no more
    assert (pool.kept, pool.disk) == (400, 1600)
    passes[1].release()  # makes room
    OffloadedTensors(pool).offload([torch.zeros(250)])
    assert (pool.kept, pool.disk) == (1000, 1600)
    assert all(torch.equal(tensor, torch.arange(100.0)) for tensor in tensors)


def test_limits_say_where_tensors_lie():
    limits = StateLimits(device=100, host=300)
    shares = [(limits.host_share(size), limits.disk_share(size)) for size in (50, 250, 1000)]
    assert shares == [(0, 0), (150, 0), (300, 600)]
    assert (UNLIMITED.host_share(1000), UNLIMITED.disk_share(1000)) == (1000, 0)
    assert limits.halved == StateLimits(50, 150)
    assert UNLIMITED.halved == UNLIMITED


def test_views_of_one_tensor_share_one_file(tmp_path):
    pool = pool_of(tmp_path, 0)
    whole = torch.randn(4, 6)
    row, turned, wide = whole[1], whole.T, whole[:, :1].expand(4, 100)
    before = [one.clone() for one in (whole, row, turned, wide)]
    OffloadedTensors(pool).offload([row, wide, turned])  # `whole` is recognised as their base
    assert pool.disk == 96
    assert all(map(torch.equal, (whole, row, turned, wide), before))
    assert wide.stride() == (6, 0)
    row.fill_(-1)
    assert (whole[1] == -1).all()
    assert (turned[:, 1] == -1).all()


def test_tensors_with_other_references_stay(tmp_path):
    pool = pool_of(tmp_path, 0)
    whole = torch.arange(24.0)
    other = whole.detach()
    OffloadedTensors(pool).offload([whole])
    assert (pool.memory, pool.disk) == (0, 0)
    del other
    OffloadedTensors(pool).offload([whole])
    assert pool.disk == 96


def test_tensors_of_the_model_stay(tmp_path):
    model = nn.BatchNorm1d(64)
    model.table = torch.ones(64)
    pool = pool_of(tmp_path, 0, model)
    views = [model.weight[:1], model.running_mean[None], model.table.expand(3, 64)]
    OffloadedTensors(pool).offload(
        [*views, model.weight, model.bias, model.running_mean, model.table]
    )
    assert (pool.memory, pool.disk) == (0, 0)
    assert mapped(tmp_path) == 0


def test_a_tensor_is_moved_although_the_model_has_dropped_one_with_its_id(tmp_path):
    model = nn.Module()
    model.tables = [torch.ones(1) for _ in range(100)]
    pool = pool_of(tmp_path, 0, model)
    former = {id(table) for table in model.tables}
    model.tables.clear()
    new = [torch.zeros(100) for _ in range(200)]
    OffloadedTensors(pool).offload(new)
    assert former - {id(tensor) for tensor in new}  # the pool holds the tables
    assert pool.disk == 200 * 400


def test_an_offloaded_tensor_is_not_written_again(tmp_path):
    pool = pool_of(tmp_path, 0)
    table, states = torch.arange(100.0), torch.arange(50.0)
    pass_ = OffloadedTensors(pool)
    pass_.offload([table, states])
    assert (pool.disk, mapped(tmp_path)) == (600, 2)
    where = table.data_ptr()
    pass_.restore()
    table += 1
    states = states + 1
    pass_.offload([table, table[:3], states])
    assert (pool.disk, mapped(tmp_path)) == (600, 2)
    assert table.data_ptr() == where
    assert torch.equal(table, torch.arange(100.0) + 1)
    assert torch.equal(states, torch.arange(50.0) + 1)
    pass_.restore()
    pass_.release()
    assert (pool.memory, pool.disk) == (0, 0)
    del table, states
    assert mapped(tmp_path) == 0


def test_memory_freed_by_one_pass_is_used_by_another(tmp_path):
    pool = pool_of(tmp_path, 400)
    first, second = OffloadedTensors(pool), OffloadedTensors(pool)
    one, two, three = (torch.full((100,), float(i)) for i in range(3))
    first.offload([one])
    second.offload([two])
    assert (pool.memory, pool.disk) == (400, 400)
    first.release()
    second.restore()
    second.offload([three])
    assert (pool.memory, pool.disk) == (400, 0)


def test_a_full_disk_is_reported_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 1, 99))
    with pytest.raises(ConfigError) as caught:
        OffloadedTensors(pool_of(tmp_path, 0)).offload([torch.zeros(2**18)])
    assert str(caught.value) == (
        f"{tmp_path}: the disk has no space for 0.00098 GiB of hidden states, "
        "0 GiB are stored already; set budget.host_gib higher"
    )
    assert list(tmp_path.iterdir()) == []


def test_tensors_are_found_in_nested_containers():
    a, b, c = torch.zeros(3).unbind()
    pair = namedtuple("pair", "first second")
    actual = list(tensors_in({"x": [a, (1, None)], "y": {"z": pair(b, "word")}, "w": c}))
    assert all(one is other for one, other in zip(actual, [a, b, c], strict=True))


# A model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("host_bytes", [None, 0, 9000])
@pytest.mark.parametrize("kind", MODELS)
def test_inputs_and_outputs_of_blocks_equal_those_of_a_whole_pass(kind, host_bytes, tmp_path):
    model, names = model_and_blocks(kind)
    expected = record_block_tensors(model, names)
    for one in batches_of(kind):
        model(**one, use_cache=False)
    twin, _ = model_and_blocks(kind)
    batches, files = batches_of(kind), []
    run = iterate_blocks(
        twin, batches, names, CPU, limits=StateLimits(host=host_bytes), folder=tmp_path
    )
    actual = {}
    for block in run:
        files.append(mapped(tmp_path))
        recorded = record_block_tensors(twin, [block.name])
        block.run(lambda _: files.append(mapped(tmp_path)))
        actual |= recorded
    assert names[0].startswith("model.vision_tower" if kind == "internvl" else "model.layers.0")
    assert list(actual) == names
    for name in names:
        assert len(actual[name]) == len(expected[name])
        for ours, theirs in zip(actual[name], expected[name], strict=True):
            assert len(ours) == len(theirs) >= 2
            assert all(map(torch.equal, ours, theirs))
    # Suspended passes were in files, of which none remains; the caller's batches were never
    # offloaded.
    assert all(count == 0 for count in files) if host_bytes is None else max(files) >= 6
    assert mapped(tmp_path) == 0
    for one, same in zip(batches, batches_of(kind), strict=True):
        assert all(torch.equal(one[key], same[key]) for key in same)


@pytest.mark.parametrize("limits", [(0, None), (0, 0), (6000, 9000)], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_tensors_around_the_loop_stay_off_a_device(kind, limits, tmp_path, monkeypatch):
    monkeypatch.setattr("emloc.calibration.blockwise.OffloadPool", SpoilingPool)
    model, names = model_and_blocks(kind)
    batches, outputs, run, ends = batches_of(kind), {}, [], []

    def call(index):
        def forward(inputs):
            unused = torch.randn(500)  # of a frame around the loop
            before = unused.clone()
            outputs[index] = model(**inputs).logits
            assert torch.equal(unused, before)

        return forward

    for block in iterate_blocks(
        model,
        batches,
        names,
        CPU,
        limits=StateLimits(*limits),
        folder=tmp_path,
        calls=[call(index) for index in range(len(batches))],
        end=lambda: ends.append(len(run)),
    ):
        block.peek(lambda _: None)
        block.run(lambda _: None)
        run.append(block.name)
    for index, batch in enumerate(batches):
        assert torch.equal(outputs[index], model(**batch, use_cache=False).logits)
    pool = SpoilingPool.pools[-1]
    assert (pool.memory, pool.disk, pool.kept) == (0, 0, 0)
    assert mapped(tmp_path) == 0
    # Both tensors of the frame come back behind each loop, and always in the first pass.
    assert ends == [len(names)]
    loops = 2 if kind == "internvl" else 1
    first, further = len(names) + 1, (len(batches) - 1) * loops
    assert 2 * len(batches) <= pool.fetched.count(2000) <= 2 * (first + further)


def test_a_limit_on_host_memory_keeps_some_tensors_in_memory(tmp_path):
    """Fewer files than with a limit of 0, and more than without a limit."""
    counts = []
    for host_bytes in (0, 9000, 10**9):
        model, names = model_and_blocks("llama")
        run = iterate_blocks(
            model,
            batches_of("llama"),
            names,
            CPU,
            limits=StateLimits(host=host_bytes),
            folder=tmp_path,
        )
        next(run)
        counts.append(mapped(tmp_path))
        run.close()
        assert mapped(tmp_path) == 0
    assert counts[0] > counts[1] > counts[2] == 0


def test_no_keys_and_values_are_cached_in_a_nested_language_model():
    """The forward of InternVL has no argument `use_cache`, but its language model has one."""
    model, names = model_and_blocks("internvl")
    caches = []
    for name in names[2:]:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kwargs: caches.append(kwargs.get("past_key_values")), with_kwargs=True
        )
    for _ in iterate_blocks(model, batches_of("internvl"), names, CPU):
        pass
    assert caches == [None] * 6
