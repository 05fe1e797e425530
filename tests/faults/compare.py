"""Compare two test suites: does the new suite catch the random faults that the old suite catches?

The script draws one-line faults with the operators of Cosmic Ray, from lines of the package that
the old suite executes. It puts each fault into a copy of the old and of the new tree. In each copy
it runs the tests that execute the line, until one fails. Both trees must contain the same package.
`tests/README.md` says how to record the traces.

    python tests/faults/compare.py --old TREE --new TREE --old-trace FOLDER --new-trace FOLDER \\
        --seed 0 --count 40 --to FOLDER
"""

from __future__ import annotations

import argparse
import csv
import filecmp
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from xml.etree import ElementTree

from coverage import CoverageData
from coverage.exceptions import DataError
from drawing import Fault, Runners, draw
from trying import Limits, Outcome, Suite, try_fault

PACKAGE = "emloc"
COLUMNS = [
    *("number", "file", "line", "operator", "diff"),
    *("old_verdict", "old_by", "old_tests", "old_seconds"),
    *("new_verdict", "new_by", "new_tests", "new_seconds"),
]


@dataclass(frozen=True)
class Side:
    """A test suite, and the tests that execute each line of the package."""

    suite: Suite
    runners: Runners


def main() -> None:
    """Draw faults, try each in both suites and write the table; skip faults already tried."""
    options = arguments()
    old, new = (
        Side(
            Suite(name, tree, python or tree / ".venv/bin/python", seconds_of(trace)),
            runners_of(trace),
        )
        for name, tree, trace, python in (
            ("old", options.old, options.old_trace, options.old_python),
            ("new", options.new, options.new_trace, options.new_python),
        )
    )
    refuse_other_packages(options.old, options.new)
    faults = draw(options.old, old.runners, options.seed, options.count)
    options.to.mkdir(parents=True, exist_ok=True)
    journal = Journal(options.to / "outcomes.jsonl")
    limits = Limits(options.test_seconds, options.fault_seconds)
    with ThreadPoolExecutor(options.jobs) as pool:
        tried = [
            pool.submit(attempt, journal, side, fault, limits, options.to, faults)
            for fault in faults
            for side in (old, new)
            if (fault.number, side.suite.name) not in journal.outcomes
        ]
    for attempted in tried:
        attempted.result()  # raises the error of a failed attempt
    write_table(options.to / "faults.csv", faults, journal)
    missed = [fault for fault in faults if is_newly_missed(journal, fault)]
    print(
        summary(faults, journal),
        *(f"missed by the new suite: {fault}" for fault in missed),
        sep="\n",
    )
    sys.exit(bool(missed))


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name in ("old", "new"):
        parser.add_argument(
            f"--{name}", type=_folder, required=True, help="source tree with its tests"
        )
        parser.add_argument(
            f"--{name}-trace",
            type=_folder,
            required=True,
            help="folder with the coverage and test times of this tree",
        )
        parser.add_argument(f"--{name}-python", type=Path, help="default: TREE/.venv/bin/python")
    parser.add_argument("--to", type=Path, required=True, help="folder for the results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=40, help="number of faults to draw")
    parser.add_argument(
        "--jobs", type=int, default=2, help="number of faults tried at the same time"
    )
    parser.add_argument(
        "--test-seconds",
        type=int,
        default=180,
        help="seconds after which a fast test counts as failed",
    )
    parser.add_argument(
        "--fault-seconds", type=int, default=7200, help="limit for all tests of one fault"
    )
    return parser.parse_args()


def _folder(text: str) -> Path:
    path = Path(text).resolve()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"no folder {path}")
    return path


def refuse_other_packages(old: Path, new: Path) -> None:
    """Exit with a message if a file of the package differs between the two trees."""
    for path in sorted((old / PACKAGE).rglob("*.py")):
        other = new / path.relative_to(old)
        if not other.exists() or not filecmp.cmp(path, other, shallow=False):
            sys.exit(f"{path.relative_to(old)} differs in {new}; both trees need the same package")


def runners_of(trace: Path) -> Runners:
    """Read from all coverage files in a folder which tests execute which line."""
    runners: dict[str, dict[int, frozenset[str]]] = {}
    for path in sorted(set(trace.glob(".coverage*")) - set(trace.glob("*.seconds"))):
        data = CoverageData(str(path))
        try:
            data.read()
        except DataError as error:  # the file of a process that was killed while writing
            print(f"skipped a coverage file: {error}", file=sys.stderr)
            continue
        for file in data.measured_files():
            place = f"{PACKAGE}/{file.rpartition(f'/{PACKAGE}/')[2]}"
            lines = runners.setdefault(place, {})
            for line, contexts in data.contexts_by_lineno(file).items():
                tests = {name.rpartition("|")[0] for name in contexts if "|" in name}
                if tests:
                    lines[line] = lines.get(line, frozenset()) | tests
    return runners


def seconds_of(trace: Path) -> dict[str, float]:
    """Read the seconds of each test from the files of `traced.py` or of JUnit in a folder."""
    seconds: dict[str, float] = {}
    for path in trace.glob("*.xml"):
        for case in ElementTree.parse(path).iter("testcase"):
            file = case.attrib["classname"].replace(".", "/") + ".py"
            seconds[f"{file}::{case.attrib['name']}"] = float(case.attrib["time"])
    for path in trace.glob("*.seconds"):
        for line in map(json.loads, path.read_text().splitlines()):
            seconds[line["test"]] = line["seconds"]
    return seconds


class Journal:
    """The outcomes of all attempts, appended to a file one by one."""

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, Lock()
        self.outcomes = dict(self._read()) if path.exists() else {}

    def _read(self) -> Iterator[tuple[tuple[int, str], Outcome]]:
        for line in map(json.loads, self.path.read_text().splitlines()):
            yield (line.pop("number"), line.pop("suite")), Outcome(**line)

    def add(self, number: int, suite: str, outcome: Outcome) -> None:
        with self.lock:
            self.outcomes[number, suite] = outcome
            with self.path.open("a") as file:
                line = {"number": number, "suite": suite, **asdict(outcome)}
                file.write(json.dumps(line) + "\n")


def attempt(
    journal: Journal, side: Side, fault: Fault, limits: Limits, to: Path, faults: list[Fault]
) -> None:
    """Try one fault in one suite, record the outcome and rewrite the table."""
    tests = sorted(side.runners.get(fault.file, {}).get(fault.line, ()))
    source = fault.source(side.suite.tree)
    outcome = try_fault(side.suite, fault.file, source, tests, limits)
    journal.add(fault.number, side.suite.name, outcome)
    print(fault.number, side.suite.name, outcome, flush=True)
    with journal.lock:
        write_table(to / "faults.csv", faults, journal)


def write_table(path: Path, faults: list[Fault], journal: Journal) -> None:
    """Write one row per fault; columns of attempts still to come are empty."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for fault in faults:
            row = {name: getattr(fault, name) for name in COLUMNS[:5]}
            for suite in ("old", "new"):
                outcome = journal.outcomes.get((fault.number, suite))
                if outcome is not None:
                    row[f"{suite}_verdict"], row[f"{suite}_by"] = outcome.verdict, outcome.by
                    row[f"{suite}_tests"] = f"{outcome.started} of {outcome.listed}"
                    row[f"{suite}_seconds"] = outcome.seconds
            writer.writerow(row)


def is_newly_missed(journal: Journal, fault: Fault) -> bool:
    """Return whether the old suite catches this fault and the new suite does not."""
    old, new = (journal.outcomes[fault.number, suite].verdict for suite in ("old", "new"))
    return old == "caught" != new


def summary(faults: list[Fault], journal: Journal) -> str:
    """Return one sentence with the number of faults that each suite caught."""
    caught = {
        suite: sum(journal.outcomes[fault.number, suite].verdict == "caught" for fault in faults)
        for suite in ("old", "new")
    }
    return f"of {len(faults)} faults the old suite caught {caught['old']}, the new {caught['new']}"


if __name__ == "__main__":
    main()
