"""Digests of training rows of any kind: equal contents have equal digests, in every process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor

from emloc.errors import ConfigError

# Python's own values, whose `repr` has all of their content.
_PLAIN = (str, bytes, int, float, bool, type(None))


def content_digest(value: Any) -> str:
    """Return 32 hex digits that depend on the content of a row.

    Args:
        value: numbers, texts, tensors, arrays, images and other objects with attributes, in
            dictionaries, lists and tuples of any depth.

    Raises:
        ConfigError: an item has no content that can be read.
    """
    hashed = xxhash.xxh3_128()
    _add(hashed, value)
    return hashed.hexdigest()


def _add(hashed: xxhash.xxh3_128, value: Any) -> None:
    """Add the type and the content of a value."""
    _add_text(hashed, f"{type(value).__name__}:")
    if isinstance(value, _PLAIN):
        _add_text(hashed, repr(value))
    elif isinstance(value, Tensor):
        _add_text(hashed, f"{tuple(value.shape)}{value.dtype}")
        if value.numel():
            flat = value.detach().cpu().reshape(-1)
            hashed.update(flat.view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            _add(hashed, key)
            _add(hashed, value[key])
    elif isinstance(value, list | tuple):
        if all(isinstance(item, _PLAIN) for item in value):
            _add_text(hashed, repr(value))
        else:
            _add_text(hashed, str(len(value)))
            for item in value:
                _add(hashed, item)
    elif callable(getattr(value, "tobytes", None)):  # arrays of numpy, images of Pillow
        shape = getattr(value, "shape", getattr(value, "size", ""))
        kind = getattr(value, "dtype", getattr(value, "mode", ""))
        _add_text(hashed, f"{shape}{kind}")
        hashed.update(value.tobytes())
    elif hasattr(value, "__dict__"):
        _add(hashed, vars(value))
    else:
        raise ConfigError(
            f"rows have an item of the type {type(value).__name__}, whose content cannot be read; "
            "pass rows of numbers, texts, tensors, arrays and images"
        )


def _add_text(hashed: xxhash.xxh3_128, text: str) -> None:
    hashed.update(text.encode())
