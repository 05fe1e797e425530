"""One short name for a value: the sha256 of its canonical JSON."""

import hashlib
import json
from typing import Any


def digest(value: Any) -> str:
    """First 16 hex digits of the sha256 of `value` as JSON with sorted keys.

    Raises:
        TypeError: `value` holds something JSON cannot name.
    """
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
