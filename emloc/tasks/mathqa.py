"""MathQA: five options in one string, of which lm-eval compares the likelihoods."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from emloc.tasks.text import TextTask

LETTERS = "abcde"

# lm-eval's own pattern (tasks/mathqa/utils.py), which cuts `1 , 000` at its comma: the text that
# is trained must be the one that is scored.
_OPTION = re.compile(r"[abcd] \) .*?, |e \) .*?$")


def options(text: str) -> list[str]:
    """The options in `a ) 24 , b ) 120 , c ) 625 , d ) 720 , e ) 1024`, without their letters."""
    return [option[4:].rstrip(" ,") for option in _OPTION.findall(text)]


@dataclass(frozen=True, kw_only=True)
class MathQA(TextTask):
    """The problem as prompt, the text of the right option as answer.

    `target` sees one more column: `answer`.
    """

    def derived(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """The right option; None where the string does not hold all five."""
        found = options(row["options"])
        if len(found) != len(LETTERS) or row["correct"] not in LETTERS:
            return None
        return {"answer": found[LETTERS.index(row["correct"])]}

    def lm_eval_templates(self) -> dict[str, str]:
        """Only the prompt: lm-eval's own target is the index of the right option."""
        return {"doc_to_text": self.prompt}
