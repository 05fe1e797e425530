"""A pytest plugin: record the processor time of each test, and tell child processes its name.

The coverage of a child process is recorded as `<test>|sub` (see `coverage.rc`). The seconds include
child processes; `$TRACE_DATA.<process>.seconds` gets one JSON line per test.
"""

import json
import os
import resource
from pathlib import Path

import pytest


def _seconds() -> float:
    """Return the processor time of this process and its finished children so far."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    os.environ["TRACE_TEST"] = f"{item.nodeid}|sub"
    before = _seconds()
    result = yield
    line = json.dumps({"test": item.nodeid, "seconds": round(_seconds() - before, 3)})
    with Path(f"{os.environ['TRACE_DATA']}.{os.getpid()}.seconds").open("a") as file:
        file.write(line + "\n")
    return result
