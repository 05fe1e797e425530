"""A task from Python's standard library: say which module a docstring comes from.

The data is real text and needs no download. The docstrings are parsed from the source files, so
that no module is imported or run.
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
from typing import Annotated, Any, ClassVar

from emloc.config.values import SEED, Checked, Range
from emloc.data.examples import Example, Examples
from emloc.errors import ConfigError
from emloc.runtime.digest import digest
from emloc.tasks.templates import compile_template, render_template

# The public modules with the most documented objects, among those in every Python from 3.11 to
# 3.14. A space marks where a name is also written as two words ("tar file", "XML-RPC"); both
# spellings are masked. The module encodings is left out, because its codecs differ by one word.
_SPELLINGS = (
    "asyncio", "bdb", "collections", "date time", "decimal", "doc test", "e mail", "enum", "http",
    "imap lib", "import lib", "inspect", "ip address", "logging", "mail box", "multi processing",
    "path lib", "py doc", "smtp lib", "statistics", "tar file", "threading", "turtle", "typing",
    "unit test", "url lib", "wsgi ref", "xml", "xml rpc", "zip file",
)  # fmt: skip
MODULES = tuple(name.replace(" ", "") for name in _SPELLINGS)

# Public module -> private module that contains its documentation (of `datetime` from 3.12 on).
_PRIVATE_MODULES = {"decimal": "_pydecimal", "datetime": "_pydatetime"}

# Packages that neither the task nor the generic text reads, at any depth.
_SKIPPED = {"test", "tests", "idlelib", "tkinter", "distutils", "lib2to3", "site-packages"}

_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

MASK = "___"
SHORTEST, LONGEST = 20, 300  # minimum and maximum characters of a text
SHORTEST_GENERIC = 200  # minimum characters of a docstring in the generic text


@dataclass(frozen=True, kw_only=True)
class StdlibModule(Checked):
    """Name the top-level module (one of 30) that the first paragraph of a docstring comes from.

    The columns of a row are `text`, the paragraph, and `module`.
    """

    section: ClassVar[str] = "task"
    lm_eval: ClassVar[None] = None

    name: str  # short name for run folders and reports; the stem of the YAML file
    # decides the order of the texts and which of them are held out
    seed: Annotated[int, SEED] = 0
    # number of held-out texts; all others are for training
    eval_rows: Annotated[int, Range(least=1, usual=512)] = 512
    # maximum number of training rows; null: all
    limit: Annotated[int | None, Range(least=1, usual=None)] = None
    prompt: str  # Jinja template over `text`
    target: str = "{{module}}"  # Jinja template of the answer to learn
    metric: str = "exact_match"  # main score: greedy exact match

    def __post_init__(self) -> None:
        """Check the settings, as far as possible without reading the source files."""
        super().__post_init__()
        compile_template("prompt", self.prompt)
        compile_template("target", self.target)

    @property
    def key(self) -> dict[str, Any]:
        """Cache key of the task: all its texts, since they depend on the Python version."""
        rows = Examples(self.name, self._rows)
        return {"name": self.name, "rows": rows.key, "eval_rows": self.eval_rows}

    def train(self) -> Examples:
        """The first `limit` rows that are not held out, in a random order given by `seed`."""
        return Examples(self.name, self._rows[self.eval_rows :][: self.limit])

    def held_out(self, limit: int | None) -> Examples:
        """The first `limit` held-out rows, a random sample of the texts; all if `limit` is None."""
        return Examples(self.name, self._rows[: self.eval_rows][:limit])

    @cached_property
    def _rows(self) -> tuple[Example, ...]:
        """All rows in a random order given by `seed`; the held-out rows come first."""
        texts = module_texts()
        if self.eval_rows >= len(texts):
            raise ConfigError(
                f"task.eval_rows={self.eval_rows} leaves no training rows of {len(texts)}; "
                "set task.eval_rows=512"
            )
        prompt = compile_template("prompt", self.prompt)
        target = compile_template("target", self.target)
        rows = []
        for text, dotted_name, module in sorted(texts, key=self._random_rank):
            row = {"text": text, "module": module}
            question = render_template("prompt", prompt, {"text": text})
            rows.append(Example(dotted_name, question, render_template("target", target, row)))
        return tuple(rows)

    def _random_rank(self, entry: tuple[str, str, str]) -> str:
        """Sort key that shuffles the texts, without dotted names, as these differ by version."""
        text, _, module = entry
        return digest([self.seed, module, text])


@cache
def generic_docstrings() -> Examples:
    """Docstrings of public modules that the task does not use, as examples without a prompt.

    They serve as generic text for calibration. None begins with a paragraph of the task. The order
    is random but fixed, so that the first rows are a random sample.
    """
    task_paragraphs = {
        _first_paragraph(doc) for module in MODULES for _, doc in _docstrings(module)
    }
    other_modules = sorted(
        name
        for name in sys.stdlib_module_names - {*MODULES} - _SKIPPED
        if not name.startswith("_") and _sources(name)
    )
    name_by_doc: dict[str, str] = {}
    for module in other_modules:
        for dotted_name, doc in sorted(_docstrings(module)):
            if len(doc) >= SHORTEST_GENERIC and _first_paragraph(doc) not in task_paragraphs:
                name_by_doc.setdefault(doc, dotted_name)
    rows = (Example(dotted_name, "", doc) for doc, dotted_name in name_by_doc.items())
    return Examples("generic_docstrings", tuple(sorted(rows, key=lambda row: digest(row.target))))


@cache
def module_texts() -> tuple[tuple[str, str, str], ...]:
    """(text, dotted name, module) of every usable first paragraph; each text appears once.

    A text that occurs in two modules has no unique answer and is left out. Of several copies within
    one module, the first by dotted name is kept.
    """
    origins: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for module, spelling in zip(MODULES, _SPELLINGS, strict=True):
        for dotted_name, doc in _docstrings(module):
            text = mask(_first_paragraph(doc), spelling)[:LONGEST].rstrip()
            origins[text].add((module, dotted_name))
    usable = []
    for text, names in sorted(origins.items()):
        if len(text) >= SHORTEST and len({module for module, _ in names}) == 1:
            module, dotted_name = min(names)
            usable.append((text, dotted_name, module))
    return tuple(usable)


def mask(text: str, spelling: str) -> str:
    """Replace the module's name in `text` by a mask, in any case and inside words.

    For instance, `http` is masked in `BaseHTTPServer`. A space in `spelling` also matches a hyphen,
    underscore or slash; such a spelling in two words is only masked from the start of a word.
    """
    in_words = "[-_/ ]".join(re.escape(part) for part in spelling.split())
    pattern = rf"{re.escape(spelling.replace(' ', ''))}|(?<![^\W_]){in_words}"
    return re.sub(pattern, MASK, text, flags=re.IGNORECASE)


def _first_paragraph(doc: str) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join(re.split(r"\n\s*\n", doc)[0].split())


def _docstrings(module: str) -> Iterator[tuple[str, str]]:
    """Yield (dotted name, docstring) of every documented object in a top-level module.

    Raises:
        ConfigError: this Python has no source files of the module.
    """
    files = _sources(module)
    if not files:
        raise ConfigError(
            f"task stdlib_module: this Python has no source files of {module} in "
            f"{_stdlib_folder()}; use a Python with its standard library, or set task=gsm8k"
        )
    for file in files:
        with tokenize.open(file) as stream:
            tree = ast.parse(stream.read())
        path = file.relative_to(_stdlib_folder()).with_suffix("").as_posix()
        yield from _node_docstrings(tree, path.replace("/", ".").removesuffix(".__init__"))


def _node_docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Yield (dotted name, docstring) of a node and all definitions in it; `name` is the node's."""
    if isinstance(node, (ast.Module, *_DEFINITIONS)) and (doc := ast.get_docstring(node)):
        yield name, doc.strip()
    for child in ast.iter_child_nodes(node):
        # Expressions are skipped: they contain no definitions.
        if isinstance(child, ast.stmt | ast.excepthandler):
            yield from _node_docstrings(
                child, f"{name}.{child.name}" if isinstance(child, _DEFINITIONS) else name
            )


def _sources(module: str) -> list[Path]:
    """Source files of a top-level module, without tests; empty if there are none."""
    stdlib = _stdlib_folder()
    single_files = [
        stdlib / f"{name}.py" for name in (module, _PRIVATE_MODULES.get(module)) if name
    ]
    package = stdlib / module
    if (package / "__init__.py").is_file():
        files: Iterable[Path] = package.rglob("*.py")
        return sorted(file for file in files if not _SKIPPED & {*file.relative_to(stdlib).parts})
    return [file for file in single_files if file.is_file()]


def _stdlib_folder() -> Path:
    """Folder of this Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))
