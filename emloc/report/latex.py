"""A table as LaTeX that needs no package but booktabs, with its notes below it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from emloc.report.table import EMPTY, Table, split

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "·": r"$\cdot$",
    "\N{MINUS SIGN}": "$-$",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}
# LaTeX would print a hyphen.
_MINUS = re.compile(r"(?<![^\s(])-(?=\d)")


def latex(table: Table, caption: str, notes: Sequence[str], label: str) -> str:
    """A `table` environment: words flush left, numbers flush right, the best cells in bold."""
    frame = table.frame.copy()
    for column in frame:
        is_best = [(index, column) in table.best for index in frame.index]
        frame[column] = [_cell(*each) for each in zip(frame[column], is_best, strict=True)]
    tabular = frame.rename(columns=escaped).to_latex(
        index=False,
        column_format="".join("r" if table.numeric(name) else "l" for name in table.columns),
    )
    return "\n".join(
        [
            r"% \usepackage{booktabs}",
            r"\begin{table}",
            r"\centering\footnotesize\setlength{\tabcolsep}{4pt}",
            rf"\caption{{{escaped(caption)}}}",
            rf"\label{{tab:{label}}}",
            tabular.rstrip(),
            *([_notes(notes)] if notes else []),
            r"\end{table}",
            EMPTY,
        ]
    )


def escaped(word: str) -> str:
    """The word as LaTeX prints it."""
    return "".join(_SPECIAL.get(sign, sign) for sign in _MINUS.sub("\N{MINUS SIGN}", word))


def _cell(word: str, is_best: bool) -> str:
    if not is_best:
        return escaped(word)
    ours, aside = split(word)
    return rf"\textbf{{{escaped(ours)}}} {escaped(aside)}".rstrip()


def _notes(notes: Sequence[str]) -> str:
    sentences = " ".join(f"{note[:1].upper()}{note[1:]}." for note in map(escaped, notes))
    return f"\\par\\smallskip\n\\parbox{{\\linewidth}}{{{sentences}}}"
