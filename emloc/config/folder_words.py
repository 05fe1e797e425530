"""Words of settings that become the name of a folder or file, and may not lead out of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from emloc.errors import ConfigError

# File systems allow 255 bytes, and the name of a run's folder has three words of settings.
LONGEST = 72

# What separates folders, and characters that cannot be printed, such as a line break.
_FORBIDDEN = re.compile(r"[/\\\x00-\x1f\x7f]")


def file_name(text: str) -> str:
    """Return the text as the name of one file, without characters that separate folders."""
    replaced = _FORBIDDEN.sub("_", text)
    return "_" * max(len(replaced), 1) if replaced in ("", ".", "..") else replaced


def safe_word(word: str) -> str:
    """Return the word as the name of one file, cut to `LONGEST` bytes.

    A word that is the name of a folder as it is stays unchanged.
    """
    encoded = file_name(word).encode(errors="replace")
    return encoded[:LONGEST].decode(errors="ignore")


def require_word(key: str, value: Any, example: str) -> None:
    """Check that the setting `key` is the name of a folder.

    Raises:
        ConfigError: it is empty or too long, leads to another folder, or cannot be printed.
    """
    word = str(value)
    if word == safe_word(word):
        return
    start = ascii(word[:LONGEST]) + ("..." if len(word) > LONGEST else "")
    raise ConfigError(
        f"{key}={start}: it names a folder or a file, so it has 1 to {LONGEST} bytes and no slash, "
        f"and it is not .. or empty; set {key}={example}"
    )


def require_words(sections: Mapping[str, Any]) -> None:
    """Check the settings that are part of the names of folders.

    Args:
        sections: section -> its object or plain value; a section that is None is not checked.

    Raises:
        ConfigError: one of them is no name of a folder.
    """
    require_word("name", sections["name"], "demo")
    require_word("method", sections["method"], "emloc")
    for section, example in (("model", "my_model"), ("task", "my_task")):
        if sections[section] is not None:
            require_word(f"{section}.name", sections[section].name, example)
    for stage in sections["stage"]:
        require_word("stage", stage, "standard")
