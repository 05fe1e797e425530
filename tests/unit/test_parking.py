"""Tensors of stopped passes wait off the device, and are what they were when they are needed."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch import nn
from walked import MODELS, batches_of, model_and_blocks, record_block_tensors

from emloc.calibration.blockwise import iterate_blocks
from emloc.calibration.offload import OffloadedTensors, OffloadPool, tensors_in
from emloc.errors import ConfigError

CPU = torch.device("cpu")


def mapped(folder: Path) -> int:
    """Files without a name in `folder` that this process has in memory."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum(str(folder) in line and line.endswith("(deleted)") for line in lines)


def pool_of(folder: Path, limit: int | None, model: nn.Module | None = None) -> OffloadPool:
    return OffloadPool(model or nn.Identity(), CPU, limit, folder)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


# One pass ----------------------------------------------------------------------------------------


def test_what_fits_stays_and_the_rest_goes_to_files_without_names(tmp_path):
    pool = pool_of(tmp_path, 500)
    small, large = torch.arange(100.0), torch.arange(300.0)
    where = small.data_ptr()
    OffloadedTensors(pool).offload([small, large])
    assert (pool.memory, pool.disk) == (400, 1200)
    assert small.data_ptr() == where
    assert mapped(tmp_path) == 1
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(large, torch.arange(300.0))


def test_without_a_limit_a_cpu_has_nothing_to_do(tmp_path):
    assert pool_of(tmp_path, None).is_idle
    assert not pool_of(tmp_path, 10**12).is_idle


def test_what_shares_memory_shares_it_on_disk_too_and_takes_it_once(tmp_path):
    pool = pool_of(tmp_path, 0)
    whole = torch.randn(4, 6)
    row, turned, wide = whole[1], whole.T, whole[:, :1].expand(4, 100)
    before = [one.clone() for one in (whole, row, turned, wide)]
    OffloadedTensors(pool).offload([row, wide, turned])  # `whole` is found as their base
    assert pool.disk == 96
    assert all(map(torch.equal, (whole, row, turned, wide), before))
    assert wide.stride() == (6, 0)
    row.fill_(-1)
    assert (whole[1] == -1).all()
    assert (turned[:, 1] == -1).all()


def test_what_somebody_else_holds_too_stays(tmp_path):
    pool = pool_of(tmp_path, 0)
    whole = torch.arange(24.0)
    other = whole.detach()
    OffloadedTensors(pool).offload([whole])
    assert (pool.memory, pool.disk) == (0, 0)
    del other
    OffloadedTensors(pool).offload([whole])
    assert pool.disk == 96


def test_nothing_of_the_model_moves(tmp_path):
    model = nn.BatchNorm1d(64)
    model.table = torch.ones(64)
    pool = pool_of(tmp_path, 0, model)
    views = [model.weight[:1], model.running_mean[None], model.table.expand(3, 64)]
    OffloadedTensors(pool).offload(
        [*views, model.weight, model.bias, model.running_mean, model.table]
    )
    assert (pool.memory, pool.disk) == (0, 0)
    assert mapped(tmp_path) == 0


def test_what_is_still_there_at_the_next_stop_is_not_moved_again(tmp_path):
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


def test_room_that_one_pass_leaves_is_the_others(tmp_path):
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


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 1, 99))
    with pytest.raises(ConfigError) as caught:
        OffloadedTensors(pool_of(tmp_path, 0)).offload([torch.zeros(2**18)])
    assert str(caught.value) == (
        f"{tmp_path}: the disk has no space for 0.00098 GiB of hidden states, "
        "0 GiB are stored already; set budget.host_gib higher"
    )
    assert list(tmp_path.iterdir()) == []


def test_tensors_are_found_in_whatever_holds_them():
    a, b, c = torch.zeros(3).unbind()
    pair = namedtuple("pair", "first second")
    found = list(tensors_in({"x": [a, (1, None)], "y": {"z": pair(b, "word")}, "w": c}))
    assert all(one is other for one, other in zip(found, [a, b, c], strict=True))


# A model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("host_bytes", [None, 0, 9000])
@pytest.mark.parametrize("kind", MODELS)
def test_blocks_take_and_give_the_very_bits_of_a_whole_pass(kind, host_bytes, tmp_path):
    model, names = model_and_blocks(kind)
    expected = record_block_tensors(model, names)
    for one in batches_of(kind):
        model(**one, use_cache=False)
    twin, _ = model_and_blocks(kind)
    given, files = batches_of(kind), []
    run = iterate_blocks(twin, given, names, CPU, host_bytes=host_bytes, folder=tmp_path)
    found = {}
    for block in run:
        files.append(mapped(tmp_path))
        seen = record_block_tensors(twin, [block.name])
        block.run(lambda _: files.append(mapped(tmp_path)))
        found |= seen
    assert names[0].startswith("model.vision_tower" if kind == "internvl" else "model.layers.0")
    assert list(found) == names
    for name in names:
        assert len(found[name]) == len(expected[name])
        for ours, theirs in zip(found[name], expected[name], strict=True):
            assert len(ours) == len(theirs) >= 2
            assert all(map(torch.equal, ours, theirs))
    # The stopped passes were in files, and nothing of it is left; the caller's batches never were.
    assert all(count == 0 for count in files) if host_bytes is None else max(files) >= 6
    assert mapped(tmp_path) == 0
    for one, same in zip(given, batches_of(kind), strict=True):
        assert all(torch.equal(one[key], same[key]) for key in same)


def test_a_limit_on_host_memory_leaves_part_of_it_there(tmp_path):
    """Fewer files than with none, more than without a limit."""
    counts = []
    for host_bytes in (0, 9000, 10**9):
        model, names = model_and_blocks("llama")
        run = iterate_blocks(
            model, batches_of("llama"), names, CPU, host_bytes=host_bytes, folder=tmp_path
        )
        next(run)
        counts.append(mapped(tmp_path))
        run.close()
        assert mapped(tmp_path) == 0
    assert counts[0] > counts[1] > counts[2] == 0


def test_no_keys_and_values_are_kept_where_another_model_would_keep_them():
    """InternVL's own forward has no `use_cache`; its language model has."""
    model, names = model_and_blocks("internvl")
    caches = []
    for name in names[2:]:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kwargs: caches.append(kwargs.get("past_key_values")), with_kwargs=True
        )
    for _ in iterate_blocks(model, batches_of("internvl"), names, CPU):
        pass
    assert caches == [None] * 6
