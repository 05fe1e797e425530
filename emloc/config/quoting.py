"""How to write an override so that the shell and Hydra both read its value as one text."""

from __future__ import annotations

import re
import shlex

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException


def quoted_override(override: str) -> str | None:
    """Return `key=value` with a value that is quoted for Hydra and for the shell.

    None: the override has no `=`, or cannot be read with a quoted value either.
    """
    key, equals, value = override.partition("=")
    if not equals:
        return None
    # Hydra takes a backslash for itself, unless it precedes a quote or the end of the text.
    escaped = re.sub(r'(\\*)("|$)', lambda match: match[1] * 2 + '\\"' * bool(match[2]), value)
    text = f'{key.strip()}="{escaped}"'
    return shlex.quote(text) if _is_readable(text) else None


def _is_readable(override: str) -> bool:
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return False
    return True
