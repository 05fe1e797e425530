"""A pytest plugin: run the tests listed in a file, in the order of the file, and report progress.

Each line of `$FAULTS_TESTS` holds a time limit in seconds and the name of a test. The plugin
appends a JSON line to `$FAULTS_PROGRESS` for each test that starts and for the first that fails.
"""

import gc
import json
import os
from pathlib import Path

import pytest


def _report(**values: str) -> None:
    with Path(os.environ["FAULTS_PROGRESS"]).open("a") as file:
        file.write(json.dumps(values) + "\n")


def pytest_collection_modifyitems(config, items):
    lines = Path(os.environ["FAULTS_TESTS"]).read_text().splitlines()
    by_name = {item.nodeid: item for item in items}
    selected = []
    for limit, name in (line.split(" ", 1) for line in lines):
        if name in by_name:
            selected.append(by_name[name])
            selected[-1].add_marker(pytest.mark.timeout(int(limit)), append=False)
    config.hook.pytest_deselected(items=[item for item in items if item not in {*selected}])
    items[:] = selected


def pytest_collection_finish(session):
    """Exclude all existing objects, mostly those of libraries, from garbage collection."""
    gc.collect()
    gc.freeze()


def pytest_runtest_logstart(nodeid, location):
    _report(started=nodeid)


def pytest_runtest_logreport(report):
    if report.failed:
        _report(failed=report.nodeid, phase=report.when)
