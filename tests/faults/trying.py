"""Put a fault into a copy of a source tree, and run tests there until one fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv", ".hypothesis", "__pycache__", "*.egg-info", "runs", "build", "dist", ".*_cache"
)
PASSED, NOTHING_TO_RUN = 0, 5


@dataclass(frozen=True)
class Suite:
    """A source tree with tests, the Python that runs the tests, and the seconds of each test."""

    name: str
    tree: Path
    python: Path
    seconds: dict[str, float]


@dataclass(frozen=True)
class Limits:
    """Time limits in seconds: of one fast test, and of all tests of one fault together."""

    test: int
    fault: int

    def of(self, seconds: float) -> float:
        """Return the limit of a test that usually takes `seconds`; generous for busy machines."""
        return max(self.test, 40 * seconds)


@dataclass(frozen=True)
class Outcome:
    """The result of trying one fault in one suite.

    `verdict` is caught, survived, no test, or unfinished (the time limit of the fault was reached).
    `by` is the test that failed, or `collection` if the tests could not be collected.
    """

    verdict: str
    by: str
    listed: int
    started: int
    seconds: float


def try_fault(
    suite: Suite, file: str, source: str, tests: Sequence[str], limits: Limits
) -> Outcome:
    """Replace `file` by the faulty `source` and run these tests, fast ones first, until one fails.

    A test that also fails without the fault does not count; the remaining tests are run then.
    """
    start, remaining = time.monotonic(), in_order(suite, tests)
    if not remaining:
        return Outcome("no test", "", 0, 0, 0.0)
    started = 0
    while True:
        with _copy(suite) as tree:
            (tree / file).write_text(source)
            verdict, by, count = _run(suite, tree, remaining, limits)
        started += count
        if verdict == "caught" and by in remaining:
            with _copy(suite) as tree:
                verdict_without_fault, _, _ = _run(suite, tree, [by], limits)
            if verdict_without_fault != "survived":
                remaining = remaining[remaining.index(by) + 1 :]
                if remaining:
                    continue
                verdict, by = "survived", ""
        seconds = round(time.monotonic() - start, 1)
        return Outcome(verdict, by, len(tests), started, seconds)


def in_order(suite: Suite, tests: Sequence[str]) -> list[str]:
    """Sort tests by speed class, then by file, since tests of one file share their fixtures."""

    def place(test: str) -> tuple[int, str, float]:
        seconds = suite.seconds.get(test, 1.0)
        return max(0, int(seconds * 4)).bit_length(), test.partition("::")[0], seconds

    return sorted(tests, key=place)


@contextmanager
def _copy(suite: Suite) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fault-", ignore_cleanup_errors=True) as home:
        tree = Path(home) / "tree"
        shutil.copytree(suite.tree, tree, ignore=NOT_COPIED)
        yield tree


def _run(suite: Suite, tree: Path, tests: Sequence[str], limits: Limits) -> tuple[str, str, int]:
    """Return the verdict, the test that failed, and the number of tests that were started."""
    test_list, progress = tree.parent / "tests", tree.parent / "progress"
    test_list.write_text(
        "\n".join(f"{limits.of(suite.seconds.get(test, 1.0)):.0f} {test}" for test in tests)
    )
    progress.touch()
    path = [str(tree), str(tree / "emloc" / "sweeps" / "plugin"), str(HERE)]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "FAULTS_TESTS": str(test_list),
        "FAULTS_PROGRESS": str(progress),
        "TMPDIR": str(tree.parent),
    }
    command = [
        *(str(suite.python), "-m", "pytest", "-x", "-p", "only", "-p", "no:cacheprovider"),
        *("--basetemp", str(tree.parent / "temp"), "--hypothesis-seed", "0"),
        *dict.fromkeys(test.partition("::")[0] for test in tests),
    ]
    with (tree.parent / "output").open("w") as output:
        process = subprocess.Popen(
            command, cwd=tree, env=env, stdout=output, stderr=output, start_new_session=True
        )
        try:
            code: int | None = process.wait(limits.fault)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    lines = [json.loads(line) for line in progress.read_text().splitlines()]
    started = [line["started"] for line in lines if "started" in line]
    failed = [line["failed"] for line in lines if "failed" in line]
    if failed:
        return "caught", failed[0], len(started)
    if code is None:
        return "unfinished", started[-1] if started else "", len(started)
    if code == PASSED:
        return "survived", "", len(started)
    if code == NOTHING_TO_RUN:
        return "no test", "", 0
    return "caught", started[-1] if started else "collection", len(started)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the test process and all processes that it has started."""
    try:
        os.killpg(process.pid, 9)
    except ProcessLookupError:
        return
    process.wait()
