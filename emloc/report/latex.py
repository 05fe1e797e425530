"""A table as LaTeX that needs no package but booktabs, with its notes below it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from emloc.report.notes import sentence
from emloc.report.table import EMPTY, Table

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
    frame = Table(table.frame.map(escaped), table.best).marked(r"\textbf{{{}}}")
    tabular = frame.rename(columns=escaped).to_latex(
        index=False,
        column_format="".join("r" if table.numeric(name) else "l" for name in table.columns),
    )
    sentences = " ".join(sentence(escaped(note)) for note in notes)
    return "\n".join(
        [
            r"% \usepackage{booktabs}",
            r"\begin{table}",
            r"\centering\footnotesize\setlength{\tabcolsep}{4pt}",
            rf"\caption{{{escaped(caption)}}}",
            rf"\label{{tab:{label}}}",
            tabular.rstrip(),
            *([r"\par\smallskip", rf"\parbox{{\linewidth}}{{{sentences}}}"] if notes else []),
            r"\end{table}",
            EMPTY,
        ]
    )


def escaped(word: str) -> str:
    """The word as LaTeX prints it."""
    return "".join(_SPECIAL.get(sign, sign) for sign in _MINUS.sub("\N{MINUS SIGN}", word))
