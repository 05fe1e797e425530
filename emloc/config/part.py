"""Base class of the parts that configuration groups offer, such as emulators and adapters."""

from __future__ import annotations

from abc import ABC
from typing import Any, Self

from emloc.config.values import Checked
from emloc.errors import ConfigError


class Part(Checked, ABC):
    """A choice of a configuration group, such as an emulator, an adapter or a recovery.

    Each group has a base class that names the group (`section`) and marks the methods of every
    choice with `@abstractmethod`.
    """

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """Create the object, if its class defines all methods of its group.

        Python would refuse the class, too, but without naming the group.

        Raises:
            ConfigError: names the missing methods.
        """
        missing = sorted(getattr(cls, "__abstractmethods__", ()))
        if missing:
            group = next(base for base in reversed(cls.__mro__) if Part in base.__bases__)
            raise ConfigError(
                f"{cls.__module__}.{cls.__qualname__} does not define {', '.join(missing)}, which "
                f"every {group.__module__}.{group.__qualname__} has; define it in that class"
            )
        return super().__new__(cls)
