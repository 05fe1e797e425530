"""What the classes behind the configuration groups have in common."""

from __future__ import annotations

from abc import ABC
from typing import Any, Self

from emloc.errors import ConfigError


class Part(ABC):  # noqa: B024 - the classes of the groups have abstract methods
    """A choice of a configuration group: an emulator, an adapter, a recovery.

    The class of each group marks with `@abstractmethod` what every choice has to define.
    """

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """Refuse a class that leaves out a method, before Python does so without naming the group.

        Raises:
            ConfigError: names the methods that are missing.
        """
        missing = sorted(getattr(cls, "__abstractmethods__", ()))
        if missing:
            group = next(base for base in reversed(cls.__mro__) if Part in base.__bases__)
            raise ConfigError(
                f"{cls.__module__}.{cls.__qualname__} does not define {', '.join(missing)}, which "
                f"every {group.__module__}.{group.__qualname__} has; define it in that class"
            )
        return super().__new__(cls)
