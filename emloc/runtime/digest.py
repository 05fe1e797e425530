"""Short hash of a value: the first digits of the sha256 of its canonical JSON."""

import hashlib
import json
from typing import Any


def digest(value: Any) -> str:
    """Return the first 16 hex digits of the sha256 of `value` as JSON with sorted keys.

    Raises:
        TypeError: `value` contains an object that JSON cannot represent.
    """
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
