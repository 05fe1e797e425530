"""Explain in one line why a configuration cannot be composed, and which words mend it."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterator, Sequence

import yaml
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from emloc.config.compose import EXTRAS, cell_names, compose, experiment_names
from emloc.config.foreign_names import difference, own_name
from emloc.config.paths import choices
from emloc.config.quoting import quoted_override
from emloc.runtime.failures import refusal_of

# Choice that examples name if no other is near.
_USUAL = {"model": "llama3_8b", "task": "gsm8k"}


def explain(error: Exception, words: Sequence[str] = ()) -> str:
    """Return one line about a configuration that cannot be composed.

    Args:
        error: as Hydra or OmegaConf raised it.
        words: the command line.
    """
    text = str(error)
    if refusal := refusal_of(error):
        return str(refusal)
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override, words)
    if match := re.match(r"(?:Ambiguous value for argument|Sweep parameters) '(.*)'", text):
        return _several_values(match[1], words)
    if isinstance(error, MissingConfigException) and (
        match := re.search(r"Could not (?:find|load) '([^']+)/([^'/]+)'", text)
    ):
        return _no_choice(match[1], match[2], error.options or [])
    if re.search(r"Could not override 'cell'", text):
        return "cell: there is no such choice; it is experiment/cell, such as demo_vqa/lora"
    if match := re.search(r"Could not override '([^'@]+)", text):
        return no_setting(match[1], words)
    if match := re.search(r"Could not delete from config\. '(.+?)' does not exist", text):
        return f"~{no_setting(match[1], words)}"
    if match := re.search(r"Could not append to config\. An item is already at '(.+?)'", text):
        return f"+{match[1]}: there is such a setting; leave out the +, as in {match[1]}=..."
    if "Config group override must be a string or a list" in text:
        return _no_name_of_choice(words)
    if isinstance(error.__cause__, OmegaConfBaseException):
        cause = error.__cause__
        return f"{cause.full_key}: {str(cause).splitlines()[0]}"
    return text.splitlines()[0]


def no_setting(key: str, words: Sequence[str] = ()) -> str:
    """Return the line about a setting that does not exist, with the one that may be meant."""
    line = f"{key}: there is no such setting"
    group, _, name = key.partition(".")
    if name and (owners := _choices_with(group, name)):
        others, verb = " and others" * (len(owners) > 3), "has" if len(owners) == 1 else "have"
        return f"{line}; {group}={', '.join(owners[:3])}{others} {verb} it"
    if own := own_name(key):
        note = difference(key)
        return f"{line}; did you mean {own}?" + (f" ({note})" if note else "")
    return line + _nearest(key, list(_settings(words)))


def _unreadable(override: str, words: Sequence[str]) -> str:
    """The line about a word that Hydra cannot parse."""
    key, equals, value = override.partition("=")
    if not equals:
        before = words[words.index(override) - 1] if override in words[1:] else ""
        line = f"{override} is no override, which is written setting=value without spaces around ="
        if "=" in before and not before.startswith("-") and not choices(before.partition("=")[0]):
            joined = quoted_override(f"{before} {override}") or shlex.quote(f"{before} {override}")
            return f"{line}; a value with spaces is quoted, as in {joined}"
        return line
    quoted = quoted_override(override)
    if quoted is None or not re.fullmatch(r"[+~]*[\w./@:-]+", key):
        return f"{override} cannot be read; write setting=value without spaces around ="
    if value.endswith(","):
        return f"{override} cannot be read, since it ends with a comma; leave the comma out"
    return f"{override} cannot be read; quote a value with special characters twice, as in {quoted}"


def _several_values(override: str, words: Sequence[str]) -> str:
    """The line about a value with commas in a single run."""
    others = [word for word in words if word != override]
    verb = next((word for word in words[:1] if not re.search("^-|=", word)), None)
    sweep = f"add -m to run each of them: {shlex.join(['emloc', '-m', override, *others])}"
    line = f"{override} names several values; {f'{verb} takes one' if verb else sweep}"
    if choices(override.partition("=")[0]) or "," not in override:
        return line
    return f"{line}; or quote one value with commas: {quoted_override(override)}"


def _no_choice(group: str, choice: str, options: Sequence[str]) -> str:
    """The line about a choice that a group does not have."""
    if extra := EXTRAS.get(f"{group}/{choice}"):
        return f"{group}={choice} is not installed; pip install 'emloc[{extra}]'"
    own, slash, rest = group.partition("/")
    if own == "cell":  # Hydra knows those of named experiments alone
        word = f"{group}/{choice}".removeprefix("cell/")
        return f"cell={word}: there is no such choice{_nearest(word, list(cell_names()))}"
    if slash and choices(own):
        return _no_path(own, f"{rest}/{choice}")
    names = experiment_names() if group == "experiments" else options
    near = _nearest(choice, names) or "; emloc --help lists all choices"
    return f"{group}={choice}: there is no such choice{near}"


def _no_path(group: str, word: str) -> str:
    """The line about a name on the hub, or a folder, in place of the choice of a group."""
    options = sorted(choices(group))
    name = re.sub(r"[^a-z0-9]+", "_", word.rpartition("/")[2].lower())
    near = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    line = f"{group}={word}: there is no such choice"
    if group not in ("model", "task"):
        return line + _nearest(word, options)
    choice = near[0] if near else _USUAL[group]
    is_folder = word.startswith(("/", ".", "~"))
    if group == "model":
        values = f"model.source={word}" if is_folder else f"model.id={word} model.source=hub"
    else:
        values = f"task.path={word}" if is_folder else f"task.id={word}"
    alike = "of the same architecture" if group == "model" else "with such columns"
    return f"{line}; take a choice {alike} and set its source, as in {group}={choice} {values}"


def _no_name_of_choice(words: Sequence[str]) -> str:
    """The line about a number or null in place of the choice of a group."""
    for word in words:
        group, _, value = word.lstrip("+").partition("=")
        if choices(group) and not isinstance(yaml.safe_load(value or '""'), str | list):
            names = sorted(choices(group))
            near = difflib.get_close_matches(value, names, n=1, cutoff=0.6)
            meant = f"; did you mean {group}={near[0]}?" if near else ""
            return f"{word}: {group} takes one of {', '.join(names)}{meant}"
    return "a group takes one of its choices, as in tracker=none"


def _choices_with(group: str, name: str) -> list[str]:
    """Choices of a group whose files set the setting `name`."""
    return [
        choice
        for choice, file in sorted(choices(group).items())
        if name in (yaml.safe_load(file.read_text(encoding="utf-8")) or {})
    ]


def _nearest(word: str, options: Sequence[str]) -> str:
    by_lower = {option.lower(): option for option in options if option != word}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {by_lower[close[0]]}?"
    return f"; there is {', '.join(options)}" if 0 < len(options) < 20 else ""


def _settings(words: Sequence[str]) -> Iterator[str]:
    """Every group and every dotted key, with the choices that the command line makes."""
    overrides = [word for word in words if choices(word.partition("=")[0]) and "," not in word]
    try:
        node = OmegaConf.to_container(compose(overrides))
    except (HydraException, OmegaConfBaseException):  # one of the choices is wrong, too
        node = OmegaConf.to_container(compose())

    def keys(value: object, path: str) -> Iterator[str]:
        if path:
            yield path
        if isinstance(value, dict):
            for key, below in value.items():
                yield from keys(below, f"{path}.{key}" if path else str(key))

    return keys(node, "")
