"""The two failures this package raises on purpose."""


class ConfigError(Exception):
    """Something the user set cannot be right; the message names the override that fixes it."""


class StageError(Exception):
    """A stage failed; raised `from` the cause and naming the stage it happened in."""

    def __init__(self, stage: str, message: str) -> None:
        super().__init__(f"{stage}: {message}")
        self.stage = stage
