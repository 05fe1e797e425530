"""Errors that reach the user as one line."""


class ConfigError(Exception):
    """A setting is wrong or missing; the message names an override that fixes it."""


class FailedWorkError(ConfigError):
    """Work of the command failed, though its settings were right."""


class SaidError(Exception):
    """A failure that is logged already; the command only ends with `code`."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class StageError(Exception):
    """A stage failed; the message names the stage, and `__cause__` is the original error."""

    def __init__(self, stage: str, message: str) -> None:
        super().__init__(f"{stage}: {message}")
        self.stage = stage


def one_line(text: object, longest: int | None = None) -> str:
    """Return a text, such as an error's, without line breaks, and its first `longest` characters.

    Each stretch of white space becomes one space.
    """
    return " ".join(str(text).split())[:longest]
