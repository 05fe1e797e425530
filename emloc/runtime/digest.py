"""Short hash of a value: the first digits of the sha256 of its canonical JSON."""

import hashlib
import json
from typing import Any

_ENCODER = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def digest(value: Any) -> str:
    """Return the first 16 hex digits of the sha256 of `value` as JSON with sorted keys.

    Raises:
        TypeError: `value` contains an object that JSON cannot represent.
    """
    return hashlib.sha256(_ENCODER.encode(value).encode()).hexdigest()[:16]
