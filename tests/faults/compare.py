"""Are the faults that one suite of tests catches caught by another one, too?

Draws one-line faults with Cosmic Ray's operators from lines of the package that the old suite's
tests run, puts each into a copy of the old and of the new tree, and runs in each the tests that run
the line, until one fails. Both trees have to hold the same package. `tests/README.md` says how the
traces are made.

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
    """A suite, and which of its tests run which line."""

    suite: Suite
    runners: Runners


def main() -> None:
    """Draw, try and write down; a fault that was tried before is not tried again."""
    wanted = arguments()
    old, new = (
        Side(
            Suite(name, tree, python or tree / ".venv/bin/python", seconds_of(trace)),
            runners_of(trace),
        )
        for name, tree, trace, python in (
            ("old", wanted.old, wanted.old_trace, wanted.old_python),
            ("new", wanted.new, wanted.new_trace, wanted.new_python),
        )
    )
    refuse_other_packages(wanted.old, wanted.new)
    faults = draw(wanted.old, old.runners, wanted.seed, wanted.count)
    wanted.to.mkdir(parents=True, exist_ok=True)
    journal = Journal(wanted.to / "outcomes.jsonl")
    limits = Limits(wanted.test_seconds, wanted.fault_seconds)
    with ThreadPoolExecutor(wanted.jobs) as pool:
        tried = [
            pool.submit(attempt, journal, side, fault, limits, wanted.to, faults)
            for fault in faults
            for side in (old, new)
            if (fault.number, side.suite.name) not in journal.outcomes
        ]
    for attempted in tried:
        attempted.result()  # or an error would go unheard
    write_table(wanted.to / "faults.csv", faults, journal)
    slipped = [one for one in faults if slips(journal, one)]
    print(summary(faults, journal), *(f"slipped: {one}" for one in slipped), sep="\n")
    sys.exit(bool(slipped))


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name in ("old", "new"):
        parser.add_argument(f"--{name}", type=_folder, required=True, help="a tree with its tests")
        parser.add_argument(
            f"--{name}-trace", type=_folder, required=True, help="folder of its coverage and times"
        )
        parser.add_argument(f"--{name}-python", type=Path, help="(TREE/.venv/bin/python)")
    parser.add_argument("--to", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=40, help="faults to draw")
    parser.add_argument("--jobs", type=int, default=2, help="faults that are tried at a time")
    parser.add_argument("--test-seconds", type=int, default=180, help="of a fast test, to fail")
    parser.add_argument("--fault-seconds", type=int, default=7200, help="for the tests of a fault")
    return parser.parse_args()


def _folder(text: str) -> Path:
    path = Path(text).resolve()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"no folder {path}")
    return path


def refuse_other_packages(old: Path, new: Path) -> None:
    """End where a file of the package is not the same in both trees."""
    for path in sorted((old / PACKAGE).rglob("*.py")):
        other = new / path.relative_to(old)
        if not other.exists() or not filecmp.cmp(path, other, shallow=False):
            sys.exit(f"{path.relative_to(old)} is another file in {new}; give trees of one package")


def runners_of(trace: Path) -> Runners:
    """Which test runs which line, of all coverage in a folder."""
    found: dict[str, dict[int, frozenset[str]]] = {}
    for path in sorted(set(trace.glob(".coverage*")) - set(trace.glob("*.seconds"))):
        data = CoverageData(str(path))
        try:
            data.read()
        except DataError as error:  # of a process that was killed while it wrote
            print(f"left out: {error}", file=sys.stderr)
            continue
        for file in data.measured_files():
            place = f"{PACKAGE}/{file.rpartition(f'/{PACKAGE}/')[2]}"
            lines = found.setdefault(place, {})
            for line, contexts in data.contexts_by_lineno(file).items():
                tests = {one.rpartition("|")[0] for one in contexts if "|" in one}
                if tests:
                    lines[line] = lines.get(line, frozenset()) | tests
    return found


def seconds_of(trace: Path) -> dict[str, float]:
    """How long each test took, by what `traced.py` or JUnit's XML in a folder say."""
    found: dict[str, float] = {}
    for path in trace.glob("*.xml"):
        for case in ElementTree.parse(path).iter("testcase"):
            file = case.attrib["classname"].replace(".", "/") + ".py"
            found[f"{file}::{case.attrib['name']}"] = float(case.attrib["time"])
    for path in trace.glob("*.seconds"):
        for line in map(json.loads, path.read_text().splitlines()):
            found[line["test"]] = line["seconds"]
    return found


class Journal:
    """The outcomes there are, kept in a file as they come."""

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
    """Try a fault in one suite, and write down what came of it."""
    tests = sorted(side.runners.get(fault.file, {}).get(fault.line, ()))
    source = fault.source(side.suite.tree)
    outcome = try_fault(side.suite, fault.file, source, tests, limits)
    journal.add(fault.number, side.suite.name, outcome)
    print(fault.number, side.suite.name, outcome, flush=True)
    with journal.lock:
        write_table(to / "faults.csv", faults, journal)


def write_table(path: Path, faults: list[Fault], journal: Journal) -> None:
    """One row a fault; what has not been tried yet is empty."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for fault in faults:
            row = {name: getattr(fault, name) for name in COLUMNS[:5]}
            for suite in ("old", "new"):
                outcome = journal.outcomes.get((fault.number, suite))
                if outcome is not None:
                    row[f"{suite}_verdict"], row[f"{suite}_by"] = outcome.verdict, outcome.by
                    row[f"{suite}_tests"] = f"{outcome.begun} of {outcome.listed}"
                    row[f"{suite}_seconds"] = outcome.seconds
            writer.writerow(row)


def slips(journal: Journal, fault: Fault) -> bool:
    """Whether the old suite catches it and the new one does not."""
    old, new = (journal.outcomes[fault.number, suite].verdict for suite in ("old", "new"))
    return old == "caught" != new


def summary(faults: list[Fault], journal: Journal) -> str:
    """How many of the faults each suite caught."""
    caught = {
        suite: sum(journal.outcomes[one.number, suite].verdict == "caught" for one in faults)
        for suite in ("old", "new")
    }
    return f"of {len(faults)} faults the old suite caught {caught['old']}, the new {caught['new']}"


if __name__ == "__main__":
    main()
