"""Draw lines of prose from a source tree, to ask a reader which lines are clear.

    python tests/words/draw.py --tree TREE --seed 0 --count 60 --to lines.csv

A line is the first sentence of a docstring, a comment, the message of an error or a log, a comment
in YAML, or the first sentence of a paragraph in a README. Each kind has a fixed share of the
sample, so that the many docstrings do not crowd out the few messages.
"""

from __future__ import annotations

import argparse
import ast
import csv
import io
import random
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SHARES = {"docstring": 0.4, "comment": 0.2, "message": 0.2, "yaml": 0.1, "readme": 0.1}
LEAST_WORDS = 4
EXCLUDED_FOLDERS = {".git", ".venv", "faults", "words", "runs", "outputs"}
PRINTING_CALLS = {"print", "info", "warning", "error", "debug", "exception", "echo"}


class Line(NamedTuple):
    """One line of prose, and the code or setting that it belongs to."""

    kind: str
    place: str
    beside: str
    text: str


def main() -> None:
    """Parse the command line and write the drawn lines as CSV."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tree", type=Path, default=Path())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--to", type=Path, required=True)
    arguments = parser.parse_args()
    lines = draw(arguments.tree, arguments.seed, arguments.count)
    with arguments.to.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["number", *Line._fields])
        writer.writerows([number, *line] for number, line in enumerate(lines, 1))


def draw(tree: Path, seed: int, count: int) -> list[Line]:
    """Draw about `count` lines of a tree, in the shares of `SHARES`, with a fixed seed."""
    generator = random.Random(seed)
    everything = sorted(lines_of(tree))
    sample = []
    for kind, share in SHARES.items():
        candidates = [line for line in everything if line.kind == kind]
        sample += generator.sample(candidates, round(count * share))
    generator.shuffle(sample)
    return sample


def lines_of(tree: Path) -> Iterator[Line]:
    """Yield all prose of at least `LEAST_WORDS` words in package, YAML files and READMEs."""
    for path in sorted(tree.rglob("*")):
        place = path.relative_to(tree)
        if EXCLUDED_FOLDERS & set(place.parts) or not path.is_file():
            continue
        if path.suffix == ".py" and place.parts[0] == "emloc":
            lines = python_lines(path.read_text(), str(place))
        elif path.suffix == ".yaml" and place.parts[0] in ("conf", "experiments"):
            lines = yaml_lines(path.read_text(), str(place))
        elif path.suffix == ".md":
            lines = markdown_lines(path.read_text(), str(place))
        else:
            continue
        yield from (line for line in lines if len(line.text.split()) >= LEAST_WORDS)


def python_lines(source: str, place: str) -> Iterator[Line]:
    """Yield the docstrings, messages and comments of a Python module."""
    code = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                beside = "" if isinstance(node, ast.Module) else code[node.lineno - 1].strip()
                yield Line("docstring", place, beside, first_sentence(docstring))
        yield from (Line("message", place, "", text) for text in messages(node))
    yield from (Line("comment", place, *comment) for comment in comments(source, code))


def messages(node: ast.AST) -> Iterator[str]:
    """Yield the message of a `raise`, log or print; values appear as `{expression}`."""
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        arguments = node.exc.args
    elif isinstance(node, ast.Call) and _name(node.func) in PRINTING_CALLS:
        arguments = node.args
    else:
        return
    for argument in arguments:
        if isinstance(argument, ast.JoinedStr | ast.Constant):
            text = ast.unparse(argument)
            if isinstance(ast.literal_eval("0" if text[0] == "f" else text), str | int):
                yield re.sub(r"^f?(['\"])(.*)\1$", r"\2", text, flags=re.DOTALL)


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def comments(source: str, code: list[str]) -> Iterator[tuple[str, str]]:
    """Yield each comment with the code it belongs to; consecutive comment lines are joined."""
    block: list[str] = []
    start = last = -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or "noqa" in token.string or "type:" in token.string:
            continue
        row, column = token.start
        before = code[row - 1][:column].strip()
        if before or row != last + 1:
            if block:
                yield code_below(code, start), " ".join(block)
            block, start = [], row
        text = token.string.lstrip("# ").strip()
        if before:
            yield before, text
            continue
        block.append(text)
        start = last = row
    if block:
        yield code_below(code, start), " ".join(block)


def code_below(code: list[str], row: int) -> str:
    """Return the first line of code after a comment that ends in line `row`."""
    return next((line.strip() for line in code[row:] if line.strip()), "")


def yaml_lines(source: str, place: str) -> Iterator[Line]:
    """Yield the comments of a YAML file; consecutive comment lines are joined."""
    block: list[str] = []
    for line in [*source.splitlines(), ""]:
        setting, mark, text = line.partition("#")
        if mark and not setting.strip():
            block.append(text.strip())
            continue
        if block:
            yield Line("yaml", place, line.strip(), " ".join(block))
            block = []
        if mark:
            yield Line("yaml", place, setting.strip(), text.strip())


def markdown_lines(source: str, place: str) -> Iterator[Line]:
    """Yield the first sentence of each paragraph and of each list item."""
    prose = re.sub(r"^```.*?^```", "", source, flags=re.DOTALL | re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*[-*] )", prose):
        text = " ".join(paragraph.split())
        if text and not text.startswith(("|", "#", "<", "![", "[![")):
            yield Line("readme", place, "", first_sentence(text))


def first_sentence(text: str) -> str:
    """Return the text up to the end of its first sentence."""
    return re.split(r"(?<=[.!?])\s+(?=[A-Z`])", " ".join(text.split("\n\n")[0].split()))[0]


if __name__ == "__main__":
    main()
