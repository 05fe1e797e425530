"""A table as LaTeX, in the manner of booktabs."""

from __future__ import annotations

import re
from collections.abc import Sequence

from emloc.report.table import Table, split

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "·": r"$\cdot$",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}
# As a hyphen it would be read as one.
_MINUS = re.compile(r"(?<![^\s(])-(?=\d)")


def latex(shown: Table, notes: Sequence[str]) -> str:
    """A `tabular` to be input into a table: columns of words flush left, of numbers flush right."""
    columns = shown.columns
    aligned = "".join("r" if shown.numeric(column) else "l" for column in columns)
    lines = [
        [
            _cell(word, (index, column) in shown.best)
            for column, word in zip(columns, words, strict=True)
        ]
        for index, words in enumerate(shown.words())
    ]
    return "\n".join(
        [
            r"% \usepackage{booktabs}",
            *(f"% {note}" for note in notes),
            rf"\begin{{tabular}}{{@{{}}{aligned}@{{}}}}",
            r"\toprule",
            _row([escaped(column) for column in columns]),
            r"\midrule",
            *(_row(line) for line in lines),
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def escaped(word: str) -> str:
    """The same word where LaTeX reads it."""
    plain = "".join(_SPECIAL.get(sign, sign) for sign in _MINUS.sub("\N{MINUS SIGN}", word))
    return plain.replace("\N{MINUS SIGN}", "$-$")


def _cell(word: str, best: bool) -> str:
    if not best:
        return escaped(word)
    ours, aside = split(word)
    return rf"\textbf{{{escaped(ours)}}} {escaped(aside)}".rstrip()


def _row(cells: list[str]) -> str:
    return " & ".join(cells) + r" \\"
