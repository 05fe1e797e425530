"""GPU slots: which job gets which GPU, and which job waits."""

import logging
import subprocess
import time

import pytest
import torch
from composed import compose_cached
from held import started_holders

from emloc.config.check import check_values
from emloc.config.settings import Budget
from emloc.errors import ConfigError
from emloc.runtime.gpu_lock import best_device, hold_slot, own_slot

HOLD = """
import sys
from pathlib import Path
from emloc.runtime.gpu_lock import hold_slot
with hold_slot(["a", "b"], int(sys.argv[2]), Path(sys.argv[1])) as index:
    print(index, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def job(tmp_path):
    """Function that starts a process which holds a slot of two devices.

    The slot is freed when the input of the process is closed.
    """
    with started_holders(HOLD, tmp_path / "devices") as start:
        yield lambda slots=1: start(slots)


def device(process: subprocess.Popen) -> int:
    return int(process.stdout.readline())


def test_the_device_with_most_free_slots_is_preferred_then_the_last_used():
    assert best_device([1, 2, 0], last=0) == 1
    assert best_device([2, 2, 2], last=2) == 2
    assert best_device([0, 2, 2], last=0) == 1
    assert best_device([0, 0], last=1) is None


def test_two_jobs_get_different_devices_and_a_third_waits_until_one_has_ended(job):
    first = job()
    assert device(first) == 0
    second = job()
    assert device(second) == 1
    third = job()
    time.sleep(1)
    assert third.poll() is None
    second.stdin.close()
    assert second.wait() == 0
    assert device(third) == 1


def test_a_killed_job_frees_its_slot(job):
    first, second = job(), job()
    first_device = device(first)
    assert {first_device, device(second)} == {0, 1}
    first.kill()
    first.wait()
    assert device(job()) == first_device


def test_jobs_that_share_devices_are_spread_evenly(job):
    jobs = []
    for _ in range(4):
        jobs.append(job(slots=2))
        jobs[-1].index = device(jobs[-1])
    assert [one.index for one in jobs] == [0, 1, 0, 1]


def test_a_device_is_freed_after_the_work_even_after_a_failure(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with pytest.raises(RuntimeError, match="why"), hold_slot(["a"], 1, tmp_path):
        raise RuntimeError("why")
    with hold_slot(["a", "b"], 1, tmp_path) as one, hold_slot(["a", "b"], 1, tmp_path) as other:
        assert (one, other) == (0, 1)
    with hold_slot(["a", "b"], 1, tmp_path, last=1) as again:
        assert again == 1
    assert "waiting for a GPU" not in caplog.text


@pytest.mark.parametrize("world", ["1", "2"])
def test_without_cuda_or_with_several_processes_no_slot_is_locked(tmp_path, monkeypatch, world):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: world == "2")
    monkeypatch.setenv("WORLD_SIZE", world)
    with own_slot(1, tmp_path / "devices"):
        assert not (tmp_path / "devices").exists()


@pytest.mark.parametrize(("jobs", "value"), [("auto", "auto"), (3, 3), ("3", 3)])
def test_jobs_of_a_device_are_a_number_or_auto(jobs, value):
    cfg = compose_cached(["model.weights=random"])
    cfg.budget.jobs_per_gpu = jobs  # a variable of the environment is a text
    assert check_values(cfg)["budget"].jobs_per_gpu == value


@pytest.mark.parametrize("word", ["four", "", "-1", "Auto"])
def test_another_word_for_the_jobs_of_a_device_is_refused(word):
    cfg = compose_cached(["model.weights=random"])
    cfg.budget.jobs_per_gpu = word
    line = f"^budget.jobs_per_gpu={word} is no number and not auto; set budget.jobs_per_gpu=1$"
    with pytest.raises(ConfigError, match=line):
        check_values(cfg)


def test_a_device_has_at_least_one_slot():
    line = "jobs_per_gpu must be at least 1 or auto, got 0; set budget"
    with pytest.raises(ConfigError, match=line):
        Budget(
            gpu_gib=None,
            gpu_states_gib=1,
            host_gib=4,
            statistics_gib=16,
            disk_gib=100,
            jobs_per_gpu=0,
        )
