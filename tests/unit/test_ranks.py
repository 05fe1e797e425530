"""The other processes of a launch: ranks, status files, and who writes logs."""

import json
import logging
import time

import pytest
import torch

from emloc.config.compose import compose
from emloc.config.run_folder import DONE, RUNNING, Run, folder_name
from emloc.errors import ConfigError
from emloc.runtime.distributed import (
    StatusFile,
    is_first,
    is_sharded,
    launch_id,
    own_device,
    process_start,
    rank,
    silence_other_processes,
    world_size,
)


@pytest.fixture
def become_rank(monkeypatch):
    """Function that makes this process one of two processes of a launch."""

    def be(rank: int, **more: str) -> None:
        for name, value in {"RANK": str(rank), "WORLD_SIZE": "2", **more}.items():
            monkeypatch.setenv(name, value)

    process_start.cache_clear()
    yield be
    process_start.cache_clear()


def test_a_process_alone_is_the_first_of_one():
    assert (rank(), world_size(), is_first()) == (0, 1, True)


def test_the_launch_id_is_shared_by_the_processes_of_a_launch(become_rank):
    become_rank(0, MASTER_PORT="1")
    one = launch_id()
    become_rank(1, MASTER_PORT="1", LOCAL_RANK="1")
    assert launch_id() == one
    assert (rank(), world_size(), is_first()) == (1, 2, False)
    become_rank(1, MASTER_PORT="2")
    assert launch_id() != one


def test_a_status_file_is_valid_only_in_its_launch(become_rank, tmp_path):
    notice = StatusFile(tmp_path / "notice")
    become_rank(0, MASTER_PORT="1")
    assert notice.read() == ("", "")
    notice.write("failed", "why")
    assert notice.read() == ("failed", "why")
    become_rank(0, MASTER_PORT="2")
    assert notice.read() == ("", "")
    notice.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_single_process_writes_no_status_file(tmp_path):
    StatusFile(tmp_path / "notice").write("begun")
    assert list(tmp_path.iterdir()) == []


def test_a_run_has_ended_if_this_launch_recorded_its_end(become_rank, tmp_path, monkeypatch):
    become_rank(1)
    run = Run(tmp_path)
    assert not run.wait_until_ended(within=0)
    run.mark(RUNNING)
    naps = []  # sleeping times of a fake clock
    with monkeypatch.context() as clock:
        clock.setattr(time, "monotonic", lambda: sum(naps))
        clock.setattr(time, "sleep", naps.append)
        assert not run.wait_until_ended(within=0.3)
    assert 0.3 <= sum(naps) < 5
    run.mark("failed", stage="train", error="why")
    assert run.wait_until_ended(within=0)
    (tmp_path / "status.json").write_text(json.dumps({"state": DONE, "time": process_start() - 1}))
    assert not run.wait_until_ended(within=0)


def test_the_run_folder_depends_on_the_number_of_processes(become_rank):
    config = compose()
    alone = folder_name(config)
    become_rank(1)
    assert folder_name(config) != alone
    assert folder_name(config).rpartition("-")[0] == alone.rpartition("-")[0]


@pytest.mark.parametrize("version", [None, "1"])
def test_only_the_second_version_of_fsdp_is_supported(become_rank, monkeypatch, version):
    become_rank(0)
    assert not is_sharded()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    if version:
        monkeypatch.setenv("FSDP_VERSION", version)
    with pytest.raises(ConfigError, match=rf"FSDP_VERSION={version}: .* set FSDP_VERSION=2"):
        is_sharded()
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert is_sharded()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not is_sharded()


def test_a_process_without_its_own_gpu_is_refused(become_rank, monkeypatch):
    become_rank(1, LOCAL_RANK="1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert own_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        ConfigError, match="process 1 of this machine has no GPU, the number of GPUs is 1; set"
    ):
        own_device()


def test_later_processes_only_warn_and_write_no_log(become_rank, tmp_path, capfd):
    become_rank(1)
    root = logging.getLogger()
    file = logging.FileHandler(tmp_path / "run.log")
    root.addHandler(file)
    try:
        silence_other_processes()
        assert file not in root.handlers
        assert not logging.getLogger("emloc").isEnabledFor(logging.INFO)
        assert logging.getLogger("emloc").isEnabledFor(logging.WARNING)
    finally:
        logging.disable(logging.NOTSET)
        root.removeHandler(file)
