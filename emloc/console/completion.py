"""Completion of a command line in a shell.

Hydra's own completion knows no verbs, and what it does not understand it reports as an error. Its
scripts for the shells are used as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

from hydra.errors import HydraException
from hydra.plugins.completion_plugin import CompletionPlugin
from omegaconf.errors import OmegaConfBaseException

from emloc.config.compose import cell_names, compose, experiment_names
from emloc.config.paths import choices, conf_folders
from emloc.console.verbs import VERBS
from emloc.errors import ConfigError

FLAGS = ("--help", "--version", "--cfg", "--multirun", "--resolve")


def complete(line: str, point: str, shell: str) -> str:
    """The completions of the last word before the cursor, as the shell's script reads them.

    Whatever is typed, this prints nothing and raises nothing: a message would land in the middle
    of the user's command line.

    Args:
        line: the command line, `emloc` included (COMP_LINE).
        point: position of the cursor in the line (COMP_POINT); anything but a number is the end.
        shell: `bash`, `zsh` or `fish`.
    """
    before = line[: int(point)] if point.isdigit() else line
    words = before.split()[1:]
    word = words.pop() if words and not before[-1].isspace() else ""
    silence = StringIO()
    try:
        with redirect_stdout(silence), redirect_stderr(silence):
            candidates = sorted({*_candidates(words, word)})
    except (Exception, SystemExit):  # why: no error may reach the command line, see above
        candidates = []
    return ("\n" if shell == "fish" else " ").join(one for one in candidates if _is_plain(one))


def _candidates(words: list[str], word: str) -> Iterable[str]:
    if words and words[0] in VERBS:
        return _of_verb(words[0], words[1:], word)
    if word.startswith("-"):
        return [flag for flag in FLAGS if flag.startswith(word)]
    verbs = [] if words else [name for name in VERBS if name.startswith(word)]
    return [*verbs, *_overrides(words, word)]


def _of_verb(verb: str, words: list[str], word: str) -> Iterable[str]:
    if word.startswith("-"):
        return [option for option in _options(verb) if option.startswith(word)]
    if verb == "plan":
        return _overrides(words, word)
    if verb in ("report", "merge"):
        return _paths(word)
    return []


def _options(verb: str) -> list[str]:
    actions = VERBS[verb].parser._actions
    return [option for action in actions for option in action.option_strings]


def _paths(word: str) -> list[str]:
    """Folders, and files of --csv, that begin with the word."""
    folder, _, name = word.rpartition("/")
    here = Path(folder or ("/" if word.startswith("/") else "."))
    start = word[: len(word) - len(name)]
    return [
        f"{start}{path.name}{'/' if path.is_dir() else ''}"
        for path in here.iterdir()
        if path.name.startswith(name) and (path.is_dir() or path.suffix == ".csv")
    ]


def _overrides(words: list[str], word: str) -> list[str]:
    """Groups, choices and settings. Of `lora=r8,r1` the last choice is completed."""
    prefix = word[0] if word[:1] in ("+", "~") else ""
    key, equals, value = word.removeprefix(prefix).partition("=")
    if not equals:
        candidates = [f"{group}=" for group in _group_names() if group.startswith(key)]
        return [f"{prefix}{one}" for one in {*candidates, *_settings(words, key)}]
    if options := _choices(key):
        before, comma, last = value.rpartition(",")
        start = f"{prefix}{key}={before}{comma}"
        return [f"{start}{option}" for option in options if option.startswith(last)]
    return [f"{prefix}{one}" for one in _settings(words, f"{key}=") if one.startswith(word)]


def _group_names() -> list[str]:
    """The groups that can be chosen from."""
    folders = {path for folder in conf_folders() for path in folder.iterdir() if path.is_dir()}
    plain = {path.name for path in folders} - {"hydra"}
    return [*plain, "cell", "experiments", "hydra/launcher", "hydra/sweeper"]


def _choices(group: str) -> list[str]:
    if group == "cell":
        return list(cell_names())
    if group == "experiments":
        return experiment_names()
    extra = ["basic", "joblib"] if group == "hydra/launcher" else []
    return [*choices(group), *extra]


def _settings(words: list[str], word: str) -> list[str]:
    """Settings that begin with the word, with these overrides; or the value of `word=`."""
    overrides = [one for one in words if "=" in one and "," not in one]
    try:
        config = compose(overrides, with_hydra=True)
    except (ConfigError, HydraException, OmegaConfBaseException):  # one of them is not finished
        config = compose(with_hydra=True)
    candidates: list[str] = CompletionPlugin._get_matches(config, word)
    return candidates


def _is_plain(candidate: str) -> bool:
    """Whether the shell reads the candidate as one word and expands nothing in it."""
    return re.fullmatch(r"[\w.,:/=@%+~-]+", candidate) is not None
