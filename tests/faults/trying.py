"""Put a fault into a copy of a tree, and run tests there until one fails."""

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
LEFT_BEHIND = shutil.ignore_patterns(
    ".git", ".venv", ".hypothesis", "__pycache__", "*.egg-info", "runs", "build", "dist", ".*_cache"
)
PASSED, NOTHING_TO_RUN = 0, 5


@dataclass(frozen=True)
class Suite:
    """A tree with tests, the Python that runs them, and what each is known to take."""

    name: str
    tree: Path
    python: Path
    seconds: dict[str, float]


@dataclass(frozen=True)
class Limits:
    """Seconds: of a fast test, which fails by passing it, and of all tests of a fault."""

    test: int
    fault: int

    def of(self, seconds: float) -> float:
        """The limit of a test that takes so long: far above it, for the machine may be busy."""
        return max(self.test, 40 * seconds)


@dataclass(frozen=True)
class Outcome:
    """`verdict`: caught, survived, no test, or unfinished (the time of the fault was up).

    `by`: the test that failed; or `collection`, where the tests could not even be collected.
    """

    verdict: str
    by: str
    listed: int
    begun: int
    seconds: float


def try_fault(
    suite: Suite, file: str, source: str, tests: Sequence[str], limits: Limits
) -> Outcome:
    """What becomes of the fault `source` of `file` when these tests run, fast ones first.

    A test that fails without the fault as well says nothing of it: the others go on without it.
    """
    start, left = time.monotonic(), in_order(suite, tests)
    if not left:
        return Outcome("no test", "", 0, 0, 0.0)
    begun = 0
    while True:
        with _copy(suite) as tree:
            (tree / file).write_text(source)
            verdict, by, count = _run(suite, tree, left, limits)
        begun += count
        if verdict == "caught" and by in left:
            with _copy(suite) as tree:
                alone, _, _ = _run(suite, tree, [by], limits)
            if alone != "survived":
                left = left[left.index(by) + 1 :]
                if left:
                    continue
                verdict, by = "survived", ""
        seconds = round(time.monotonic() - start, 1)
        return Outcome(verdict, by, len(tests), begun, seconds)


def in_order(suite: Suite, tests: Sequence[str]) -> list[str]:
    """Fast ones first; those that take about as long by file, for they share what they set up."""

    def place(test: str) -> tuple[int, str, float]:
        seconds = suite.seconds.get(test, 1.0)
        return max(0, int(seconds * 4)).bit_length(), test.partition("::")[0], seconds

    return sorted(tests, key=place)


@contextmanager
def _copy(suite: Suite) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fault-", ignore_cleanup_errors=True) as home:
        tree = Path(home) / "tree"
        shutil.copytree(suite.tree, tree, ignore=LEFT_BEHIND)
        yield tree


def _run(suite: Suite, tree: Path, tests: Sequence[str], limits: Limits) -> tuple[str, str, int]:
    """Verdict, the test that failed, and how many were begun."""
    listed, said = tree.parent / "tests", tree.parent / "said"
    listed.write_text(
        "\n".join(f"{limits.of(suite.seconds.get(test, 1.0)):.0f} {test}" for test in tests)
    )
    said.touch()
    path = [str(tree), str(tree / "emloc" / "plugins"), str(HERE)]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "FAULTS_TESTS": str(listed),
        "FAULTS_SAID": str(said),
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
    lines = [json.loads(line) for line in said.read_text().splitlines()]
    begun = [line["begun"] for line in lines if "begun" in line]
    failed = [line["failed"] for line in lines if "failed" in line]
    if failed:
        return "caught", failed[0], len(begun)
    if code is None:
        return "unfinished", begun[-1] if begun else "", len(begun)
    if code == PASSED:
        return "survived", "", len(begun)
    if code == NOTHING_TO_RUN:
        return "no test", "", 0
    return "caught", begun[-1] if begun else "collection", len(begun)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the tests and whatever they have started."""
    try:
        os.killpg(process.pid, 9)
    except ProcessLookupError:
        return
    process.wait()
