"""A pytest plugin: processes that a test starts know its name, and how long each test took is kept.

Coverage of such a process is recorded under `<test>|sub` (`coverage.rc`). The seconds, of processor
time with that of child processes, go to `$TRACE_DATA.<process>.seconds`: one JSON line a test.
"""

import json
import os
import resource
from pathlib import Path

import pytest


def _seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    os.environ["TRACE_TEST"] = f"{item.nodeid}|sub"
    before = _seconds()
    result = yield
    line = json.dumps({"test": item.nodeid, "seconds": round(_seconds() - before, 3)})
    with Path(f"{os.environ['TRACE_DATA']}.{os.getpid()}.seconds").open("a") as file:
        file.write(line + "\n")
    return result
