"""Draw one-line faults: a line that tests run, then one of Cosmic Ray's mutations of it."""

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

# File within the tree -> line -> tests that run it.
Runners = Mapping[str, Mapping[int, frozenset[str]]]


@dataclass(frozen=True)
class Fault:
    """A mutation: which occurrence of an operator in a file, and what it does to the line."""

    number: int
    file: str
    line: int
    operator: str
    occurrence: int
    diff: str

    def source(self, tree: Path) -> str:
        """The file with the fault in it."""
        changed = mutated((tree / self.file).read_text(), self.operator, self.occurrence)
        assert changed is not None
        return changed


def draw(tree: Path, runners: Runners, seed: int, count: int) -> list[Fault]:
    """`count` faults on as many lines, each line as likely as any other, and then each mutation.

    Lines within functions that some test runs. What a module does when it is imported is done
    before any test. A mutation counts that changes one line, and not in its annotations alone.
    """
    dice = random.Random(seed)
    lines = [
        (file, line)
        for file in sorted(runners)
        for line in sorted(within_functions((tree / file).read_text()) & set(runners[file]))
    ]
    dice.shuffle(lines)
    faults: list[Fault] = []
    for file, line in lines:
        if len(faults) == count:
            break
        source = (tree / file).read_text()
        found = [(name, index) for name, index, at in mutations(source) if at == line]
        dice.shuffle(found)
        for name, index in found:
            changed = mutated(source, name, index)
            if changed is not None and is_fault(source, changed, line):
                faults.append(Fault(len(faults), file, line, name, index, diff_of(source, changed)))
                break
    return faults


def within_functions(source: str) -> set[int]:
    """The lines of statements in bodies of functions."""
    found: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for part in node.body:
                assert part.end_lineno is not None
                found.update(range(part.lineno, part.end_lineno + 1))
    return found


def mutations(source: str) -> Iterator[tuple[str, int, int]]:
    """Operator, occurrence and first line of every mutation there is of a file."""
    nodes = list(ast_nodes(get_ast(source)))
    for name in sorted(plugins.operator_names()):
        kind = plugins.get_operator(name)
        if kind.arguments():  # one that has to be told what to put in
            continue
        operator = kind()
        places = (start for node in nodes for start, _ in operator.mutation_positions(node))
        for occurrence, (line, _) in enumerate(places):
            yield name, occurrence, line


def mutated(source: str, operator: str, occurrence: int) -> str | None:
    """The file with that mutation, if there is one."""
    changed: str | None = mutate_code(source, plugins.get_operator(operator)(), occurrence)
    return changed


def is_fault(source: str, changed: str, line: int) -> bool:
    """Whether it changes that line alone, can be compiled, and is not of annotations alone."""
    before, after = source.splitlines(), changed.splitlines()
    if len(before) != len(after):
        return False
    pairs = enumerate(zip(before, after, strict=True), 1)
    if [number for number, (one, other) in pairs if one != other] != [line]:
        return False
    try:
        return _meaning(source) != _meaning(changed)
    except SyntaxError:
        return False


def _meaning(source: str) -> str:
    """The program without its annotations, which nothing here asks for when it runs."""
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
    """The line before and after."""
    lines = difflib.unified_diff(source.splitlines(), changed.splitlines(), lineterm="", n=0)
    return "\n".join(f"{line[0]} {line[1:].strip()}" for line in list(lines)[3:])
