"""MathQA: multiple-choice questions with five options in one string, scored by lm-eval."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from emloc.errors import ConfigError
from emloc.tasks.text import TextTask

LETTERS = "abcde"

# lm-eval's own pattern (tasks/mathqa/utils.py). It cuts `1 , 000` at the comma, and is copied with
# this flaw, because the model must be trained on the text that lm-eval scores.
_OPTION = re.compile(r"[abcd] \) .*?, |e \) .*?$")


def options(text: str) -> list[str]:
    """Split `a ) 24 , b ) 120 , c ) 625 , d ) 720 , e ) 1024` into the options without letters."""
    return [option[4:].rstrip(" ,") for option in _OPTION.findall(text)]


@dataclass(frozen=True, kw_only=True)
class MathQA(TextTask):
    """MathQA with the problem as prompt and the text of the correct option as answer.

    The template `target` can use one more column, `answer`: the text of the correct option.
    """

    def derived_columns(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """The column `answer` with the correct option; None if the row is malformed."""
        for column in ("options", "correct"):
            if column not in row:
                raise ConfigError(
                    f"task {self.name}: the rows have no column {column}, but {', '.join(row)}; "
                    "set task.path or task.id to a copy of MathQA"
                )
        texts = options(row["options"] or "")
        # A letter must be exactly one of the five: "" and "ab" are contained in "abcde", too.
        if len(texts) != len(LETTERS) or row["correct"] not in tuple(LETTERS):
            return None
        return {"answer": texts[LETTERS.index(row["correct"])]}

    def lm_eval_templates(self) -> dict[str, str]:
        """The prompt alone, since lm-eval's own target is the index of the correct option."""
        return {"doc_to_text": self.prompt}
