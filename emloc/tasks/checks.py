"""Checks of settings that several tasks have."""

from __future__ import annotations

from emloc.errors import ConfigError


def refuse_limit(limit: int | None) -> None:
    """Check `task.limit`, the maximum number of training rows.

    Raises:
        ConfigError: the limit is below 1.
    """
    if limit is not None and limit < 1:
        raise ConfigError(
            f"task.limit must be at least 1 or null, got {limit}; set task.limit=null"
        )


def refuse_answer_tokens(count: int, usual: int) -> None:
    """Check `task.answer_tokens`, the maximum length of an answer; errors suggest `usual`.

    Raises:
        ConfigError: the number is below 1.
    """
    if count < 1:
        raise ConfigError(
            f"task.answer_tokens must be at least 1, got {count}; set task.answer_tokens={usual}"
        )
