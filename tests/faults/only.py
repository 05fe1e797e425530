"""A pytest plugin: run the tests that a file names, in its order, and say how it goes.

`$FAULTS_TESTS` has one test a line, behind the seconds after which it has failed. To `$FAULTS_SAID`
goes a JSON line for each test that is begun and for the first that fails.
"""

import gc
import json
import os
from pathlib import Path

import pytest


def _say(**values: str) -> None:
    with Path(os.environ["FAULTS_SAID"]).open("a") as file:
        file.write(json.dumps(values) + "\n")


def pytest_collection_modifyitems(config, items):
    lines = Path(os.environ["FAULTS_TESTS"]).read_text().splitlines()
    by_name = {item.nodeid: item for item in items}
    chosen = []
    for limit, name in (line.split(" ", 1) for line in lines):
        if name in by_name:
            chosen.append(by_name[name])
            chosen[-1].add_marker(pytest.mark.timeout(int(limit)), append=False)
    config.hook.pytest_deselected(items=[item for item in items if item not in {*chosen}])
    items[:] = chosen


def pytest_collection_finish(session):
    """The collector passes over what is there: the libraries, which no test is about."""
    gc.collect()
    gc.freeze()


def pytest_runtest_logstart(nodeid, location):
    _say(begun=nodeid)


def pytest_runtest_logreport(report):
    if report.failed:
        _say(failed=report.nodeid, phase=report.when)
