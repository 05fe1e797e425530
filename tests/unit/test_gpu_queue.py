"""Jobs that share GPUs by memory: which one starts, which one waits, and what ends with it."""

import logging
import re
import time
from contextlib import nullcontext

import pytest
import torch
from held import started_holders

from emloc.runtime import gpu_ledger
from emloc.runtime.gpu_ledger import hold_share, is_mps_running, most_jobs, own_share
from emloc.runtime.gpu_queue import (
    GpuMemory,
    Job,
    Share,
    Wait,
    foreign_bytes,
    jobs_that_fit,
    share_for,
)

GIB = 2**30
HOLD = """
import sys
from pathlib import Path
from emloc.runtime.gpu_ledger import hold_share
from emloc.runtime.gpu_queue import GpuMemory
with hold_share([GpuMemory("a", 10, lambda: 10)], int(sys.argv[2]), 9, Path(sys.argv[1])) as share:
    print(share.reserved, flush=True)
    sys.stdin.read()
"""


def gpu(name="a", total=10, free=None):
    return GpuMemory(name, total, lambda: total if free is None else free)


def waiting(ticket, need=4, gpus=("a",)):
    return Job(ticket, tuple(gpus), need)


def running(ticket, reserved=4, on="a", foreign=0):
    return Job(ticket, (on,), reserved, Share(0, on, reserved, foreign, 1))


# Who may start -----------------------------------------------------------------------------------


def test_jobs_share_a_gpu_until_its_memory_is_reserved():
    assert share_for(waiting(1), [gpu()], [], 9) == Share(0, "a", 4, 0, 1)
    assert share_for(waiting(2), [gpu()], [running(1)], 9) == Share(0, "a", 4, 0, 2)
    answer = share_for(waiting(3), [gpu()], [running(1), running(2)], 9)
    assert isinstance(answer, Wait)
    assert re.fullmatch(r"this job takes .* and 2 jobs run on it with .* reserved", answer.reason)
    assert isinstance(share_for(waiting(3, need=2), [gpu()], [running(1), running(2)], 9), Share)


def test_a_gpu_has_no_more_jobs_than_its_cores_allow():
    answer = share_for(waiting(3, need=1), [gpu()], [running(1, 1), running(2, 1)], 2)
    assert answer == Wait("2 jobs run on it, as many as this machine has cores for")
    assert isinstance(share_for(waiting(3, need=1), [gpu()], [running(1, 1)], 2), Share)


def test_cores_are_divided_among_the_gpus(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(17)))
    assert (most_jobs(1), most_jobs(2), most_jobs(8), most_jobs(32)) == (17, 8, 2, 1)


def test_a_job_waits_behind_an_earlier_one_that_waits_for_the_same_gpu():
    earlier = waiting(2, need=8)
    jobs = [running(1), earlier]
    assert isinstance(share_for(waiting(3, need=1), [gpu()], jobs, 9), Wait)
    assert isinstance(share_for(earlier, [gpu()], [running(1), waiting(3, need=1)], 9), Wait)
    assert isinstance(share_for(earlier, [gpu()], [waiting(3, need=1)], 9), Share)
    both = waiting(3, need=1, gpus=("a", "b"))
    assert share_for(both, [gpu("a"), gpu("b")], jobs, 9) == Share(1, "b", 1, 0, 1)


@pytest.mark.parametrize("need", [None, 9, 10, 11, 10**6])
def test_a_job_that_needs_most_of_a_gpu_or_an_unknown_amount_has_it_alone(need):
    assert share_for(waiting(1, need), [gpu(free=7)], [], 9) == Share(0, "a", 10, 3, 1)
    assert isinstance(share_for(waiting(2, need), [gpu()], [running(1, 1)], 9), Wait)
    assert isinstance(share_for(waiting(2, 1), [gpu()], [running(1, 10)], 9), Wait)


def test_jobs_are_spread_over_gpus_by_memory_and_then_prefer_the_last_one():
    gpus = [gpu("a"), gpu("b"), gpu("c")]
    assert share_for(waiting(1), gpus, [], 9, last=2).gpu == "c"
    assert share_for(waiting(2), gpus, [running(1, 4, "c")], 9, last=2).gpu == "a"
    jobs = [running(1, 4, "c"), running(2, 3, "a"), running(3, 4, "b")]
    assert share_for(waiting(4), gpus, jobs, 9, last=2) == Share(0, "a", 4, 0, 2)
    larger = [gpu("a"), gpu("b", total=20)]
    assert share_for(waiting(2), larger, [running(1, 9, "b")], 9).gpu == "b"


def test_a_job_waits_for_memory_that_other_programs_use_while_jobs_run():
    answer = share_for(waiting(2), [gpu(free=1)], [running(1, 4)], 9)  # 9 in use, 4 reserved
    assert isinstance(answer, Wait)
    assert "other programs use" in answer.reason
    assert isinstance(share_for(waiting(2), [gpu(free=6)], [running(1, 4)], 9), Share)
    used = [gpu("a", free=1), gpu("b")]
    assert share_for(waiting(1), used, [], 9) == Share(1, "b", 4, 0, 1)
    assert isinstance(share_for(waiting(2, need=7), used, [running(1, 4, "b")], 9), Wait)


def test_a_job_starts_alone_where_only_other_programs_use_memory():
    assert share_for(waiting(1), [gpu(free=1)], [], 9) == Share(0, "a", 10, 9, 1)


def test_a_gpu_is_asked_for_its_free_memory_only_if_the_job_may_start_there():
    def asked() -> int:
        raise AssertionError("asked")

    unasked = GpuMemory("a", 10, asked)
    assert isinstance(share_for(waiting(2, 7), [unasked], [running(1)], 9), Wait)
    assert isinstance(share_for(waiting(2), [unasked], [running(1)], 1), Wait)
    assert isinstance(share_for(waiting(2), [unasked], [waiting(1)], 9), Wait)


@pytest.mark.parametrize(
    ("used", "shares", "foreign"),
    [
        (3, [], 3),
        (3, [(4, 0)], 0),  # the job has not yet taken all of its share
        (6, [(4, 0)], 2),  # a program has begun
        (3, [(4, 2)], 2),  # it was there when the job started
        (1, [(4, 2)], 1),  # and has ended in part
        (9, [(4, 0), (3, 1)], 2),
    ],
)
def test_what_other_programs_use_lies_between_its_bounds(used, shares, foreign):
    assert foreign_bytes(used, [Share(0, "a", one, other, 1) for one, other in shares]) == foreign


def test_as_many_equal_jobs_fit_as_memory_and_cores_allow():
    assert jobs_that_fit(gpu(), 3, 9) == 3
    assert jobs_that_fit(gpu(), 3, 2) == 2
    assert jobs_that_fit(gpu(free=6), 3, 9) == 2  # four bytes are those of other programs
    assert jobs_that_fit(gpu(), 9, 9) == 1


# The ledger --------------------------------------------------------------------------------------


@pytest.fixture
def job(tmp_path):
    """Function that starts a process which holds so many of the ten bytes of a GPU."""
    with started_holders(HOLD, tmp_path / "devices") as start:
        yield start


def entries(folder):
    return sorted(int(path.stem) for path in (folder / "devices/jobs").glob("*.json"))


def until(holds):
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_killed_jobs_free_their_memory_and_no_job_overtakes(tmp_path, job):
    first, second = job(4), job(5)
    assert {first.stdout.readline(), second.stdout.readline()} == {"4\n", "5\n"}
    large = job(7)
    until(lambda: entries(tmp_path) == [1, 2, 3])
    small = job(1)
    until(lambda: entries(tmp_path) == [1, 2, 3, 4])
    first.kill()  # leaves room for the small job alone, which came later
    first.wait()
    until(lambda: len(entries(tmp_path)) == 3)
    time.sleep(0.6)
    assert (large.poll(), small.poll()) == (None, None)
    assert [(tmp_path / f"devices/jobs/{n}.lock").exists() for n in (3, 4)] == [True, True]
    second.kill()
    second.wait()
    assert large.stdout.readline() == "7\n"
    assert small.stdout.readline() == "1\n"
    assert entries(tmp_path) == [3, 4]
    large.stdin.close()
    small.stdin.close()
    assert (large.wait(), small.wait()) == (0, 0)
    assert list((tmp_path / "devices/jobs").iterdir()) == []


def test_a_share_ends_with_the_work_even_after_a_failure(tmp_path):
    with pytest.raises(RuntimeError, match="why"), hold_share([gpu()], None, 9, tmp_path):
        raise RuntimeError("why")
    with hold_share([gpu()], 4, 9, tmp_path) as one, hold_share([gpu()], 4, 9, tmp_path) as two:
        assert (one.jobs, two.jobs) == (1, 2)
    assert list((tmp_path / "jobs").iterdir()) == []


def test_a_job_that_died_while_it_wrote_counts_for_nothing(tmp_path):
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/7.json").write_text('{"ticket": 7, "gp')
    (tmp_path / "jobs/7.lock").touch()
    (tmp_path / "jobs/9.lock").touch()
    with hold_share([gpu()], None, 9, tmp_path) as share:
        assert share.jobs == 1
        assert [path.stem for path in (tmp_path / "jobs").iterdir()] == ["10", "10"]


# The log -----------------------------------------------------------------------------------------


@pytest.fixture
def two_jobs(tmp_path, monkeypatch, caplog):
    """Function that runs a job on a GPU that another one uses, and returns its log."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(gpu_ledger, "visible_gpus", lambda: ["a"])
    monkeypatch.setattr(gpu_ledger, "gpu_memory", lambda name, index: gpu(name, 10 * GIB))
    monkeypatch.setattr(gpu_ledger, "last_gpu", lambda: 0)
    monkeypatch.setattr(gpu_ledger, "current_gpu", lambda index: nullcontext())
    monkeypatch.setattr(gpu_ledger, "most_jobs", lambda gpus: 2)

    def run() -> str:
        with own_share(lambda: GIB, tmp_path) as one, own_share(lambda: GIB, tmp_path) as two:
            assert (one.jobs, two.jobs) == (1, 2)
        return caplog.text

    return run


def test_a_job_that_shares_a_gpu_without_mps_says_how_to_start_it(two_jobs, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path / "mps"))
    assert not is_mps_running()
    text = two_jobs()
    assert text.count("share this GPU") == 1
    assert "2 jobs share this GPU and take turns" in text
    assert "`nvidia-cuda-mps-control -d`" in text


def test_a_job_that_shares_a_gpu_with_mps_says_nothing(two_jobs, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path / "mps"))
    (tmp_path / "mps").mkdir()
    (tmp_path / "mps/control").touch()
    assert is_mps_running()
    assert two_jobs() == ""


def test_a_job_that_waits_says_why_once(two_jobs, tmp_path, monkeypatch, caplog):
    naps = []
    monkeypatch.setattr(gpu_ledger.time, "sleep", naps.append)
    answers = iter([Wait("no memory"), Wait("no memory"), Wait("no cores"), Share(0, "a", 1, 0, 1)])
    monkeypatch.setattr(gpu_ledger, "share_for", lambda *_: next(answers))
    with own_share(lambda: GIB, tmp_path):
        assert [one.getMessage() for one in caplog.records] == ["waiting for a GPU: no memory"]
    assert len(naps) == 3


@pytest.mark.parametrize("world", ["1", "2"])
def test_without_cuda_or_with_several_processes_nothing_is_reserved(tmp_path, monkeypatch, world):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: world == "2")
    monkeypatch.setenv("WORLD_SIZE", world)

    def need() -> int:
        raise AssertionError("nothing is planned")

    with own_share(need, tmp_path / "devices") as share:
        assert share is None
        assert not (tmp_path / "devices").exists()
