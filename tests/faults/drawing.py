"""Draw one-line faults: a line that tests execute, then a mutation of this line by Cosmic Ray."""

from __future__ import annotations

import ast
import difflib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code

# File within the tree -> line number -> tests that execute the line.
Runners = Mapping[str, Mapping[int, frozenset[str]]]


@dataclass(frozen=True)
class Fault:
    """A mutation of one line: file, line, operator, occurrence of the operator, and the diff."""

    number: int
    file: str
    line: int
    operator: str
    occurrence: int
    diff: str

    def source(self, tree: Path) -> str:
        """Return the source of the file with the fault."""
        changed = mutated((tree / self.file).read_text(), self.operator, self.occurrence)
        assert changed is not None
        return changed


def draw(tree: Path, runners: Runners, seed: int, count: int) -> list[Fault]:
    """Draw `count` faults, each on another line.

    First a line is drawn, then a mutation of the line, both uniformly. Only lines in functions that
    a test executes are drawn, since lines at module level run during the import, before any test.
    A mutation must change exactly one line, and more than annotations.
    """
    generator = random.Random(seed)
    lines = [
        (file, line)
        for file in sorted(runners)
        for line in sorted(within_functions((tree / file).read_text()) & set(runners[file]))
    ]
    generator.shuffle(lines)
    faults: list[Fault] = []
    for file, line in lines:
        if len(faults) == count:
            break
        source = (tree / file).read_text()
        candidates = [(name, index) for name, index, at in mutations(source) if at == line]
        generator.shuffle(candidates)
        for name, index in candidates:
            changed = mutated(source, name, index)
            if changed is not None and is_fault(source, changed, line):
                faults.append(Fault(len(faults), file, line, name, index, diff_of(source, changed)))
                break
    return faults


def within_functions(source: str) -> set[int]:
    """Return the numbers of all lines in the bodies of functions."""
    lines: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for part in node.body:
                assert part.end_lineno is not None
                lines.update(range(part.lineno, part.end_lineno + 1))
    return lines


def mutations(source: str) -> Iterator[tuple[str, int, int]]:
    """Yield operator, occurrence and first line of each possible mutation of a file."""
    nodes = list(ast_nodes(get_ast(source)))
    for name in sorted(plugins.operator_names()):
        kind = plugins.get_operator(name)
        if kind.arguments():  # an operator that needs arguments, such as a replacement
            continue
        operator = kind()
        places = (start for node in nodes for start, _ in operator.mutation_positions(node))
        for occurrence, (line, _) in enumerate(places):
            yield name, occurrence, line


def mutated(source: str, operator: str, occurrence: int) -> str | None:
    """Return the source with this mutation; None if the occurrence does not exist."""
    changed: str | None = mutate_code(source, plugins.get_operator(operator)(), occurrence)
    return changed


def is_fault(source: str, changed: str, line: int) -> bool:
    """Return whether only this line differs, and the changed file compiles to another program."""
    before, after = source.splitlines(), changed.splitlines()
    if len(before) != len(after):
        return False
    pairs = enumerate(zip(before, after, strict=True), 1)
    if [number for number, (one, other) in pairs if one != other] != [line]:
        return False
    try:
        return _program(source) != _program(changed)
    except SyntaxError:
        return False


def _program(source: str) -> str:
    """Return the syntax tree without annotations, which have no effect at run time."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return ast.dump(tree)


def diff_of(source: str, changed: str) -> str:
    """Return the changed line before and after the mutation."""
    lines = difflib.unified_diff(source.splitlines(), changed.splitlines(), lineterm="", n=0)
    return "\n".join(f"{line[0]} {line[1:].strip()}" for line in list(lines)[3:])
