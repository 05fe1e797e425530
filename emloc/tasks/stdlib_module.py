"""Docstrings of Python's own standard library, each to be traced to its module.

Real text that every machine has: nothing is downloaded, and nothing is imported or run, since
docstrings are read from the source files.
"""

from __future__ import annotations

import ast
import re
import sys
import sysconfig
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar

from emloc.data.examples import Example, Examples
from emloc.errors import ConfigError
from emloc.runtime.digest import digest
from emloc.tasks.checks import refuse_limit
from emloc.tasks.templates import compile_template, render_template

# Public modules in every Python from 3.11 to 3.14 with the most first paragraphs. A blank shows
# where the name is also written apart ("tar file", "XML-RPC"); both spellings are masked.
# Left out: encodings, whose codecs differ by one word.
_SPELLED = (
    "asyncio", "bdb", "collections", "date time", "decimal", "doc test", "e mail", "enum", "http",
    "imap lib", "import lib", "inspect", "ip address", "logging", "mail box", "multi processing",
    "path lib", "py doc", "smtp lib", "statistics", "tar file", "threading", "turtle", "typing",
    "unit test", "url lib", "wsgi ref", "xml", "xml rpc", "zip file",
)  # fmt: skip
MODULES = tuple(name.replace(" ", "") for name in _SPELLED)

# Where a public module hides its documentation in a private one. `datetime` does from 3.12 on.
_HIDDEN = {"decimal": "_pydecimal", "datetime": "_pydatetime"}

# Neither the task nor the generic corpus looks into these, at any depth.
_SKIPPED = {"test", "tests", "idlelib", "tkinter", "distutils", "lib2to3", "site-packages"}

_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

MASK = "___"
SHORTEST, LONGEST = 20, 300  # characters of a text
SHORTEST_GENERIC = 200  # characters of a whole docstring in the generic corpus


@dataclass(frozen=True, kw_only=True)
class StdlibModule:
    """First paragraph of a docstring -> top-level module, one of 30; columns `text`, `module`."""

    lm_eval: ClassVar[None] = None

    name: str  # word for run folders and reports; the stem of the YAML file
    seed: int = 0  # which texts are held out, and the order of all of them
    eval_rows: int = 512  # texts held out; all others are for training
    limit: int | None = None  # at most this many training rows; null is all
    prompt: str  # Jinja template over `text`
    target: str = "{{module}}"  # Jinja template of the answer to learn
    metric: str = "exact_match"  # headline score: our greedy match

    def __post_init__(self) -> None:
        """Refuse what can be seen to be wrong without reading the sources."""
        if self.eval_rows < 1:
            raise ConfigError(
                f"task.eval_rows must be at least 1, got {self.eval_rows}; set task.eval_rows=512"
            )
        refuse_limit(self.limit)
        compile_template("prompt", self.prompt)
        compile_template("target", self.target)

    @property
    def key(self) -> dict[str, Any]:
        """The very texts, because interpreters differ in them."""
        rows = Examples(self.name, self._rows)
        return {"name": self.name, "rows": rows.key, "eval_rows": self.eval_rows}

    def train(self) -> Examples:
        """The first `limit` rows that are not held out, in an order that only `seed` decides."""
        return Examples(self.name, self._rows[self.eval_rows :][: self.limit])

    def held_out(self, limit: int | None) -> Examples:
        """The first `limit` rows held out: a random sample, whatever the limit."""
        return Examples(self.name, self._rows[: self.eval_rows][:limit])

    @cached_property
    def _rows(self) -> tuple[Example, ...]:
        texts = module_texts()
        if self.eval_rows >= len(texts):
            raise ConfigError(
                f"task.eval_rows={self.eval_rows} leaves no training rows of {len(texts)}; "
                "set task.eval_rows=512"
            )
        prompt = compile_template("prompt", self.prompt)
        target = compile_template("target", self.target)
        rows = []
        for text, where, module in sorted(texts, key=self._rank):
            row = {"text": text, "module": module}
            question = render_template("prompt", prompt, {"text": text})
            rows.append(Example(where, question, render_template("target", target, row)))
        return tuple(rows)

    def _rank(self, entry: tuple[str, str, str]) -> str:
        """Random but fixed place of a text; without its id, which differs between Pythons."""
        text, _, module = entry
        return digest([self.seed, module, text])


@cache
def generic_docstrings() -> Examples:
    """Whole docstrings of public modules outside the task's, as answers to an empty prompt.

    For calibration on generic text: none opens with a paragraph that the task asks about. The
    order is fixed and random, so that any prefix is a fair sample.
    """
    asked = {_paragraph(doc) for module in MODULES for _, doc in _docstrings_of(module)}
    others = sorted(
        name
        for name in sys.stdlib_module_names - {*MODULES} - _SKIPPED
        if not name.startswith("_") and _sources(name)
    )
    found: dict[str, str] = {}
    for module in others:
        for where, doc in sorted(_docstrings_of(module)):
            if len(doc) >= SHORTEST_GENERIC and _paragraph(doc) not in asked:
                found.setdefault(doc, where)
    rows = (Example(where, "", doc) for doc, where in found.items())
    return Examples("generic_docstrings", tuple(sorted(rows, key=lambda row: digest(row.target))))


@cache
def module_texts() -> tuple[tuple[str, str, str], ...]:
    """(text, dotted name, module) of every usable first paragraph, each text once.

    A text found in two modules has no right answer and is dropped altogether; of copies within
    one module the first by dotted name stays.
    """
    owners: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for module, spelled in zip(MODULES, _SPELLED, strict=True):
        for where, doc in _docstrings_of(module):
            owners[mask(_paragraph(doc), spelled)[:LONGEST].rstrip()].add((module, where))
    usable = []
    for text, homes in sorted(owners.items()):
        if len(text) >= SHORTEST and len({module for module, _ in homes}) == 1:
            module, where = min(homes)
            usable.append((text, where, module))
    return tuple(usable)


def mask(text: str, spelled: str) -> str:
    """`text` without the module's name in any case, also inside longer words (`BaseHTTPServer`).

    A blank in `spelled` stands for a hyphen, underscore, slash or space, from a word's start on.
    """
    apart = "[-_/ ]".join(re.escape(part) for part in spelled.split())
    pattern = rf"{re.escape(spelled.replace(' ', ''))}|(?<![^\W_]){apart}"
    return re.sub(pattern, MASK, text, flags=re.IGNORECASE)


def _paragraph(doc: str) -> str:
    """The first paragraph on one line."""
    return " ".join(re.split(r"\n\s*\n", doc)[0].split())


def _docstrings_of(module: str) -> Iterator[tuple[str, str]]:
    """(dotted name, docstring) of everything documented in a top-level module."""
    files = _sources(module)
    if not files:
        raise ConfigError(
            f"task stdlib_module: this Python has no source files of {module} in {_root()}; "
            "use a Python installed with its standard library, or set task=gsm8k"
        )
    for file in files:
        with tokenize.open(file) as stream:
            tree = ast.parse(stream.read())
        dotted = file.relative_to(_root()).with_suffix("").as_posix().replace("/", ".")
        yield from _walk(tree, dotted.removesuffix(".__init__"))


def _walk(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, (ast.Module, *_DEFINITIONS)) and (doc := ast.get_docstring(node)):
        yield name, doc.strip()
    for child in ast.iter_child_nodes(node):
        # Definitions stand in statements only: expressions need no visit.
        if isinstance(child, ast.stmt | ast.excepthandler):
            yield from _walk(
                child, f"{name}.{child.name}" if isinstance(child, _DEFINITIONS) else name
            )


def _sources(module: str) -> list[Path]:
    """Source files of a top-level module, without tests; empty where there are none."""
    single = [_root() / f"{name}.py" for name in (module, _HIDDEN.get(module)) if name]
    package = _root() / module
    if (package / "__init__.py").is_file():
        files: Iterable[Path] = package.rglob("*.py")
        return sorted(file for file in files if not _SKIPPED & {*file.relative_to(_root()).parts})
    return [file for file in single if file.is_file()]


def _root() -> Path:
    return Path(sysconfig.get_path("stdlib"))
