"""What the READMEs, CONTRIBUTING and CHANGELOG point to: links, commands, files of a plug-in."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("conf", "emloc", "experiments", "notebooks", "tests")
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
DOCUMENTS = (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *(ROOT / folder / "README.md" for folder in FOLDERS),
    ROOT / "experiments" / "results" / "README.md",
)

PLUGIN = "my_plugin"
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
_PLUGIN_FILE = re.compile(rf"^`{PLUGIN}/([\w./]+)`\n\n```\w+\n(.*?)^```$", re.S | re.M)
_LINK = re.compile(r"\[(?:[^][]|\[[^]]*\])*\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")
_VARIABLE = re.compile(r'\b([A-Z])="([^"]*)"')


def name_of(document: Path) -> str:
    """The document's path in the repository."""
    return document.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Link:
    """A relative link: the file that it points to, and the anchor in that file or an empty text."""

    document: Path
    target: str

    @property
    def path(self) -> Path:
        return (self.document.parent / (self.target.partition("#")[0] or self.document)).resolve()

    @property
    def anchor(self) -> str:
        return self.target.partition("#")[2]


def links(document: Path) -> list[Link]:
    """All relative links and images of a document."""
    targets = _LINK.findall(_FENCE.sub("", document.read_text()))
    return [Link(document, one) for one in targets if not re.match(r"https?:", one)]


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a document."""
    text = _FENCE.sub("", document.read_text())
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    plain = (re.sub(r"[`*]|\]\([^)]*\)|\[", "", heading).strip() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


def shell_lines(document: Path) -> Iterator[str]:
    """Every line of a bash block and every piece of inline code, without comments.

    Variables such as `$T` have the value that the document gives them.
    """
    text = document.read_text()
    values = dict(_VARIABLE.findall(text))
    blocks = [body for language, body in _FENCE.findall(text) if language == "bash"]
    lines = [line for block in blocks for line in block.splitlines()]
    for line in [*lines, *_CODE.findall(_FENCE.sub("", text))]:
        command = re.sub(r"\s+# .*", "", line)
        yield re.sub(r"\$([A-Z])\b", lambda match: values.get(match[1], match[0]), command)


def commands(document: Path) -> list[list[str]]:
    """The words behind `emloc` in every command of a document.

    Words that end in `...` or `=` are left out: the reader completes them. So are verbs without
    arguments, which the text may only mention.
    """
    found = []
    for line in shell_lines(document):
        if match := re.search(r"(?:^|\$\(|-m )emloc( [^)]*|)\)?\"?$", line):
            words = [one for one in shlex.split(match[1]) if not one.endswith(("...", "="))]
            if words not in ([], ["report"], ["merge"], ["plan"]):
                found.append(words)
    return found


def overrides(document: Path) -> list[list[str]]:
    """Every piece of inline code that is nothing but overrides, each with a value of its own.

    Those of `hydra.*` need a launcher or a sweeper, and those of the shell begin in upper case.
    """
    word = r'(?!hydra\.)[a-z][\w./]*=[^\s|<"]*[^\s|<",.=]'
    code = dict.fromkeys(_CODE.findall(_FENCE.sub("", document.read_text())))
    return [one.split() for one in code if re.fullmatch(rf"{word}(?: {word})*", one)]


def python_blocks(document: Path) -> list[str]:
    """The Python code of a document, but for files of the plug-in."""
    text = _PLUGIN_FILE.sub("", document.read_text())
    return [body for language, body in _FENCE.findall(text) if language == "python"]


def make_targets(document: Path) -> set[str]:
    """The targets of every `make` command of a document."""
    found = (re.findall(r"(?:^|time )make ([a-z -]+)$", line) for line in shell_lines(document))
    return {target for words in found for word in words for target in word.split()}


def plugin_files(document: Path = CONTRIBUTING) -> dict[str, str]:
    """Path in the plug-in's folder -> content, of every block under the name of such a file."""
    return dict(_PLUGIN_FILE.findall(document.read_text()))


def write_plugin(folder: Path) -> None:
    """Write the examples of CONTRIBUTING as one plug-in."""
    for name, content in plugin_files().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def table_below(document: Path, heading: str) -> list[list[str]]:
    """The cells of each row of the first table below a heading, without its head."""
    text = document.read_text().split(f"\n{heading}\n", 1)[1]
    rows = re.search(r"(?:^\|.*\n)+", text, re.M)
    assert rows is not None, heading
    return [line.strip("|\n ").split("|") for line in rows[0].splitlines()[2:]]


def choices_in(cell: str) -> set[str]:
    """Names in inline code, `a_{1,2}` as two names."""
    names = set()
    for code in _CODE.findall(cell):
        stem, _, rest = code.partition("{")
        names |= {stem + one for one in rest.rstrip("}").split(",")}
    return names
