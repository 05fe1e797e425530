"""A process that shares one core with busy loops, and has its own cores back afterwards."""

import os
import threading

from emloc.cost.bench.busy import shared_core


def test_all_threads_run_on_one_core_for_a_while():
    before, others = os.sched_getaffinity(0), children_of(os.getpid())
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        with shared_core(1):
            core = {min(before)}
            assert os.sched_getaffinity(0) == core
            assert os.sched_getaffinity(thread.native_id) == core
            (child,) = set(children_of(os.getpid())) - set(others)
            assert os.sched_getaffinity(child) == core
        assert os.sched_getaffinity(0) == os.sched_getaffinity(thread.native_id) == before
        assert child not in children_of(os.getpid())
    finally:
        done.set()
        thread.join()


def children_of(process):
    with open(f"/proc/{process}/task/{process}/children") as file:
        return [int(child) for child in file.read().split()]
