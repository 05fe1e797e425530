"""Lines that refuse words of the command line which are neither verbs, overrides nor flags."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from hydra._internal.utils import get_args_parser

from emloc.config.foreign_names import own_name
from emloc.config.paths import choices
from emloc.console.verbs import VERBS

# Words that other tools have for what a run of this one does without a verb.
_RUN_WORDS = ("run", "train", "fit", "finetune", "fine-tune", "sft", "eval", "evaluate", "test")


def no_verb(words: Sequence[str]) -> str:
    """Return the line that refuses a first word which is neither a verb nor an override."""
    word, rest = words[0], list(words[1:])
    if rest[:1] == ["="]:
        return f"write settings without spaces around =, as in {word}={''.join(rest[1:2])}"
    verbs = f"the verbs are help, {', '.join(VERBS)}"
    if word.lower() in _RUN_WORDS:
        command = " ".join(["emloc", *rest]) if rest else "emloc method=lora task=gsm8k"
        return (
            f"there is no verb {word}; a run, which trains and scores, needs none, as in "
            f"{command}; {verbs}"
        )
    if choices(word):
        return f"{word} is a group; choose as in {word}={next(iter(sorted(choices(word))))}"
    if "." in word and choices(word.partition(".")[0]):
        return f"{word} lacks a value; write {word}=VALUE"
    close = difflib.get_close_matches(word, ["help", *VERBS], n=1, cutoff=0.5)
    return f"there is no verb {word}; {f'did you mean {close[0]}?' if close else verbs}"


def unknown_flag(words: Sequence[str]) -> str | None:
    """Return the line that refuses a flag which does not exist; None if all of them do."""
    flags = [flag for action in get_args_parser()._actions for flag in action.option_strings]
    for word in words:
        flag, equals, value = word.partition("=")
        is_known = (
            any(one.startswith(flag) for one in flags)  # argparse takes the beginning of a flag
            if flag.startswith("--")
            else flag in flags or (not equals and flag[:2] in flags)
        )
        if word.startswith("-") and not is_known:
            key = flag.lstrip("-")
            setting = own_name(key.replace("-", "_")) or key
            example = f"{setting}={value if equals else 'VALUE'}"
            return (
                f"there is no flag {flag}; settings have no dashes, as in {example}; "
                "emloc --help lists settings and flags"
            )
    return None
